// What the engine's guard asks at every call, about objects and memory that the last forward has pushed out of the cache.
//
//     Structure   modules, their dicts and lists, classes and methods
//     Weights     address, version counter, dtype and a sample of the values of tensors
//
// Each is given its addresses once and then reads them in loops of independent loads, fetching ahead; the same checks in
// Python spend most of their time on cache misses, one after the other. Nothing here owns what it looks at: the caller keeps the
// dicts, the tensors and their memory alive (a reference held here would be invisible to Python's garbage collector).
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fb {

inline void fetch(const void* address) { __builtin_prefetch(address); }

// After a call or lookup that failed: an Exception counts as another answer and is forgotten, what is more than that (KeyboardInterrupt)
// goes on to the caller.
inline void forget_exception() {
  if (PyErr_Occurred() == nullptr) return;
  if (!PyErr_ExceptionMatches(PyExc_Exception)) throw pybind11::error_already_set();
  PyErr_Clear();
}

// The result of a call or lookup that may fail, let go of at the end of the scope.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (object_ == nullptr) forget_exception();
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }  // nullptr: it failed

 private:
  PyObject* object_;
};

// What an attribute that a class computes is of an object, without a search for its name: a new reference, nullptr after a failure.
inline PyObject* attribute(PyObject* descriptor, PyObject* object) {
  return Py_TYPE(descriptor)->tp_descr_get(descriptor, object, reinterpret_cast<PyObject*>(Py_TYPE(object)));
}

// Whether a tree of modules is what it was, everything compared by identity: what dicts, lists and sets hold, what the root's own
// attributes are, the classes of the root and of other objects, and the methods of classes.
class Structure {
 public:
  using Pair = std::pair<PyObject*, PyObject*>;
  struct Class {
    PyObject *type, *space;      // its __dict__, a mapping
    std::vector<Pair> methods;  // name, value
    unsigned tag = 0;            // Python's number of this version of the class, which no other version has; 0: it has none
  };

  // Of the attributes of `root`, the one called `ignored` may come and go.
  Structure(PyObject* root, PyObject* attributes, PyObject* ignored, std::vector<PyObject*> objects, std::vector<PyObject*> dicts,
            std::vector<PyObject*> containers, std::vector<Class> classes)
      : root_type_(Py_TYPE(root)), ignored_(ignored), objects_(std::move(objects)), dicts_(std::move(dicts)), containers_(std::move(containers)), classes_(std::move(classes)) {
    for (PyObject* object : objects_) types_.push_back(Py_TYPE(object));
    const auto keep = [this](PyObject* key, PyObject* value) {
      items_.emplace_back(key, value);
      return true;
    };
    each(attributes, [&](PyObject* key, PyObject* value) { return is_ignored(key) || keep(key, value); });
    starts_.push_back(items_.size());
    for (PyObject* dict : dicts_) {
      each(dict, keep);
      starts_.push_back(items_.size());
      versions_.push_back(version(dict));
    }
    for (PyObject* container : containers_) {
      elements_.emplace_back();
      each_element(container, [this](PyObject* element) { return elements_.back().push_back(element), true; });
    }
    for (Class& known : classes_) {
      const Owned looked_up(PyObject_GetAttrString(known.type, "__init__"));  // this gives a class its tag
      known.tag = tag(known.type);
      if (!same_methods(known)) known.tag = 0;  // another thread has just changed it
    }
  }

  bool same(PyObject* root, PyObject* attributes) const {
    return Py_TYPE(root) == root_type_ && same_dicts() && same_attributes(attributes) && same_types() && same_elements() && same_classes();
  }

 private:
  template <typename Visit>
  static bool each(PyObject* dict, Visit visit) {
    PyObject *key, *value;
    Py_ssize_t at = 0;
    bool going = true;
#ifdef Py_GIL_DISABLED
    Py_BEGIN_CRITICAL_SECTION(dict);
#endif
    while (going && PyDict_Next(dict, &at, &key, &value)) going = visit(key, value);
#ifdef Py_GIL_DISABLED
    Py_END_CRITICAL_SECTION();
#endif
    return going;
  }

  bool is_ignored(PyObject* key) const {
    return key == ignored_ || (PyUnicode_CheckExact(key) && PyUnicode_Compare(key, ignored_) == 0);
  }

  bool same_dicts() const {
    constexpr size_t kAhead = 12;
    for (size_t i = 0; i < dicts_.size(); ++i) {
      if (i + kAhead < dicts_.size()) fetch(dicts_[i + kAhead]);
      const uint64_t now = version(dicts_[i]);
      if (now != 0 && now == versions_[i]) continue;
      size_t at = starts_[i];
      const size_t end = starts_[i + 1];
      const auto is_next = [&](PyObject* key, PyObject* value) { return at < end && items_[at++] == Pair(key, value); };
      if (!each(dicts_[i], is_next) || at != end) return false;
      if (now != 0) versions_[i] = now;
    }
    return true;
  }

  bool same_attributes(PyObject* attributes) const {
    size_t i = 0;
    const size_t count = starts_.front();
    const uint64_t now = version(attributes);
    if (now != 0 && now == attributes_version_) return true;
    const bool same = each(attributes, [&](PyObject* key, PyObject* value) {
      if (i < count && items_[i] == Pair(key, value)) return ++i, true;
      return is_ignored(key);
    });
    if (!same || i != count) return false;
    if (now != 0) attributes_version_ = now;
    return true;
  }

  bool same_types() const {
    constexpr size_t kAhead = 12;
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (i + kAhead < objects_.size()) fetch(objects_[i + kAhead]);
      if (Py_TYPE(objects_[i]) != types_[i]) return false;
    }
    return true;
  }

  // The elements of a list or set, in its order.
  template <typename Visit>
  static bool each_element(PyObject* container, Visit visit) {
    const Owned iterator(PyObject_GetIter(container));
    if (iterator.get() == nullptr) return false;
    for (;;) {
      const Owned element(PyIter_Next(iterator.get()));
      if (element.get() == nullptr) return true;
      if (!visit(element.get())) return false;
    }
  }

  bool same_elements() const {
    for (size_t i = 0; i < containers_.size(); ++i) {
      const std::vector<PyObject*>& seen = elements_[i];
      size_t at = 0;
      if (!each_element(containers_[i], [&](PyObject* element) { return at < seen.size() && seen[at++] == element; }) || at != seen.size()) return false;
    }
    return true;
  }

  // A class whose tag is the old one has not been assigned to, nor has any of its bases.
  bool same_classes() const {
    return std::all_of(classes_.begin(), classes_.end(),
                       [](const Class& known) { return (known.tag != 0 && tag(known.type) == known.tag) || same_methods(known); });
  }

  static bool same_methods(const Class& known) {
    return std::all_of(known.methods.begin(), known.methods.end(),
                       [&](const Pair& method) { return Owned(PyObject_GetItem(known.space, method.first)).get() == method.second; });
  }

  // A number that no two states of dicts share (PEP 509); 0 where Python does not tell.
  static uint64_t version([[maybe_unused]] PyObject* dict) {
#if PY_VERSION_HEX < 0x030C0000
    return reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#else
    return 0;
#endif
  }

  static unsigned tag(PyObject* type) {
#ifdef Py_GIL_DISABLED
    return 0;  // another thread may be changing it
#else
    const auto* found = reinterpret_cast<const PyTypeObject*>(type);
#if PY_VERSION_HEX < 0x030C0000
    if (!PyType_HasFeature(const_cast<PyTypeObject*>(found), Py_TPFLAGS_VALID_VERSION_TAG)) return 0;
#endif
    return static_cast<unsigned>(found->tp_version_tag);
#endif
  }

  const PyTypeObject* root_type_;
  PyObject* ignored_;
  std::vector<PyObject*> objects_;
  std::vector<const PyTypeObject*> types_;
  std::vector<PyObject*> dicts_, containers_;
  std::vector<Class> classes_;
  std::vector<Pair> items_;      // of the attributes, then of the dicts
  std::vector<size_t> starts_;   // of the dicts' items
  mutable std::vector<uint64_t> versions_;  // of the dicts, when they last had these items; changed under the GIL
  mutable uint64_t attributes_version_ = 0;
  std::vector<std::vector<PyObject*>> elements_;  // of the containers
};

// A hash of a sample of each memory block: `samples` words in runs of four, spread evenly, first and last included; the whole block
// when it has no more than that. A run is one cache line, so that 16 samples cost four misses.
class Fingerprint {
 public:
  Fingerprint(const std::vector<intptr_t>& addresses, const std::vector<int64_t>& bytes, int64_t samples) {
    for (size_t i = 0; i < addresses.size(); ++i) {
      const int64_t words = bytes[i] / 4, runs = std::max<int64_t>(2, samples / kRun);
      if (words <= runs * kRun) {
        pieces_.push_back({reinterpret_cast<const char*>(addresses[i]), words, bytes[i] % 4});
        continue;
      }
      for (int64_t r = 0; r < runs; ++r) {
        const int64_t at = r * (words - kRun) / (runs - 1) / kRun * kRun;
        const int64_t offset = r + 1 == runs ? bytes[i] - 4 * kRun : 4 * at;
        pieces_.push_back({reinterpret_cast<const char*>(addresses[i]) + offset, kRun, 0});
      }
    }
  }

  uint64_t value() const {
    constexpr size_t kAhead = 24;
    uint64_t hash = 0x9E3779B97F4A7C15u;
    for (size_t i = 0; i < pieces_.size(); ++i) {
      if (i + kAhead < pieces_.size()) fetch(pieces_[i + kAhead].data);
      const auto add = [&](int64_t offset, size_t bytes) {
        uint32_t word = 0;
        std::memcpy(&word, pieces_[i].data + offset, bytes);
        hash = (hash ^ word) * 0xFF51AFD7ED558CCDu;
        hash ^= hash >> 32;
      };
      for (int64_t j = 0; j < pieces_[i].words; ++j) add(4 * j, 4);
      if (pieces_[i].rest > 0) add(4 * pieces_[i].words, static_cast<size_t>(pieces_[i].rest));
    }
    return hash;
  }

 private:
  static constexpr int64_t kRun = 4;
  struct Piece {
    const char* data;
    int64_t words, rest;  // of four bytes, and bytes after them
  };
  std::vector<Piece> pieces_;
};

// Whether tensors are where they were, with the versions, dtypes and sampled values that they had.
class Weights {
 public:
  // `lines`: addresses that the questions will read, as hints: they may be stale.
  Weights(std::vector<PyObject*> tensors, PyObject* data_ptr, PyObject* version, PyObject* dtype, std::vector<intptr_t> lines, Fingerprint values)
      : tensors_(std::move(tensors)), data_ptr_(data_ptr), version_(version), dtype_(dtype), lines_(std::move(lines)), values_(std::move(values)), fingerprint_(values_.value()) {
    for (PyObject* tensor : tensors_) facts_.push_back(facts_of(tensor));
  }

  bool same() const {
    for (const intptr_t line : lines_) fetch(reinterpret_cast<const void*>(line));
    for (size_t i = 0; i < tensors_.size(); ++i) {
      const Facts now = facts_of(tensors_[i]);
      if (now.dtype == nullptr || !(now == facts_[i])) return false;
    }
    return values_.value() == fingerprint_;
  }

 private:
  struct Facts {
    long long address, version;
    const void* dtype;  // nullptr: something could not be asked
    bool operator==(const Facts& other) const { return address == other.address && version == other.version && dtype == other.dtype; }
  };

  Facts facts_of(PyObject* tensor) const {
    const Owned address(PyObject_CallOneArg(data_ptr_, tensor)), version(attribute(version_, tensor)), dtype(attribute(dtype_, tensor));
    if (address.get() == nullptr || version.get() == nullptr) return {0, 0, nullptr};
    const Facts facts{PyLong_AsLongLong(address.get()), PyLong_AsLongLong(version.get()), dtype.get()};
    forget_exception();
    return facts;
  }

  std::vector<PyObject*> tensors_;
  PyObject *data_ptr_, *version_, *dtype_;  // of the class Tensor
  std::vector<intptr_t> lines_;
  Fingerprint values_;
  uint64_t fingerprint_;
  std::vector<Facts> facts_;
};

}  // namespace fb

// What the engine's guard asks at every call, about objects and memory that the last forward has pushed out of the cache.
//
// Each class is given its addresses once and then reads them in one loop of independent loads, fetching ahead; the same checks in
// Python spend most of their time on cache misses, one after the other. Nothing here owns what it looks at: the caller keeps the
// dicts, the tensors and their memory alive (a reference held here would be invisible to Python's garbage collector).
#pragma once

#include <Python.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace fb {

inline void fetch(const void* address) { __builtin_prefetch(address); }

// Whether a tree of modules is what it was, everything compared by identity: what dicts hold, what the root's own attributes are, the
// classes of the root and of other objects, and the methods in the namespaces of classes.
class Structure {
 public:
  struct Method {
    PyObject *owner, *name, *value;  // owner: a mapping
  };

  // Of the attributes of `root`, the one called `ignored` may come and go.
  Structure(PyObject* root, PyObject* attributes, PyObject* ignored, std::vector<PyObject*> objects, std::vector<PyObject*> dicts,
            std::vector<Method> methods)
      : root_type_(Py_TYPE(root)), ignored_(ignored), objects_(std::move(objects)), dicts_(std::move(dicts)), methods_(std::move(methods)) {
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
    }
  }

  bool same(PyObject* root, PyObject* attributes) const {
    return Py_TYPE(root) == root_type_ && same_dicts() && same_attributes(attributes) && same_types() && same_methods();
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
      size_t at = starts_[i];
      const size_t end = starts_[i + 1];
      const auto is_next = [&](PyObject* key, PyObject* value) { return at < end && items_[at++] == std::make_pair(key, value); };
      if (!each(dicts_[i], is_next) || at != end) return false;
    }
    return true;
  }

  bool same_attributes(PyObject* attributes) const {
    size_t i = 0;
    const size_t count = starts_.front();
    return each(attributes, [&](PyObject* key, PyObject* value) {
             if (i < count && items_[i] == std::make_pair(key, value)) return ++i, true;
             return is_ignored(key);
           }) && i == count;
  }

  bool same_types() const {
    constexpr size_t kAhead = 12;
    for (size_t i = 0; i < objects_.size(); ++i) {
      if (i + kAhead < objects_.size()) fetch(objects_[i + kAhead]);
      if (Py_TYPE(objects_[i]) != types_[i]) return false;
    }
    return true;
  }

  bool same_methods() const {
    return std::all_of(methods_.begin(), methods_.end(), [](const Method& method) {
      PyObject* now = PyObject_GetItem(method.owner, method.name);
      if (now == nullptr) PyErr_Clear();
      Py_XDECREF(now);
      return now == method.value;
    });
  }

  const PyTypeObject* root_type_;
  PyObject* ignored_;
  std::vector<PyObject*> objects_;
  std::vector<const PyTypeObject*> types_;
  std::vector<PyObject*> dicts_;
  std::vector<Method> methods_;
  std::vector<std::pair<PyObject*, PyObject*>> items_;  // of the attributes, then of the dicts
  std::vector<size_t> starts_;                          // of the dicts' items
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

// Fetches cache lines ahead of whoever reads them next. The addresses are hints: they may be stale.
class Lines {
 public:
  explicit Lines(const std::vector<intptr_t>& addresses) : addresses_(addresses) {}
  void load() const {
    for (const intptr_t address : addresses_) fetch(reinterpret_cast<const void*>(address));
  }

 private:
  std::vector<intptr_t> addresses_;
};

}  // namespace fb

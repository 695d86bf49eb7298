// A call of a plan that is like the last one, from the conditions to the result, without Python's interpreter in between.
//
// It knows the answers with which the engine's rules let that call pass, and asks for them again: of the surroundings, of the input,
// of the model. If one of them differs it has no opinion, and the engine takes the long way, which knows the reasons: LeNet-5 takes 14 us
// in its kernels and took 17 us around them.
//
// Like what is in watch.h it owns nothing of what it looks at.
#pragma once

#include <pybind11/pybind11.h>

#include <functional>
#include <utility>
#include <vector>

#include "../cpu/plan.h"
#include "watch.h"

namespace fb {

class Shortcut {
 public:
  struct Question {
    PyObject *ask, *answer;  // something callable, or a descriptor
  };
  struct Parts {
    std::vector<Question> surroundings;         // called without arguments
    std::vector<Question> attributes, methods;  // of the input
    PyObject *input_type, *function;            // what x is an instance of, and of what function `plain` is a bound method
    const Structure* structure;
    const Weights* weights;
    PyObject *optimizers, *guard;  // their counters, called `epoch`, must agree
    const Plan* plan;
    PyObject *take_arena, *give_arena, *make_result, *data_ptr;
  };

  explicit Shortcut(Parts parts) : parts_(std::move(parts)) {}

  // What the model returns for x; None: take the long way.
  pybind11::object operator()(PyObject* model, PyObject* x, PyObject* plain) const {
    namespace py = pybind11;
    if (!like_before(x, plain)) return py::none();
    const bool serial = parts_.plan->team(0) <= 1;
    if (serial && !same_model(model)) return py::none();
    const py::object result = called(PyObject_CallNoArgs(parts_.make_result)), arena = called(PyObject_CallNoArgs(parts_.take_arena));
    const std::vector<void*> externals{address(x), address(result.ptr())};
    void* const memory = address(arena.ptr());
    const std::function<bool()> check = [&] {
      const py::gil_scoped_acquire acquire;
      return same_model(model);
    };
    bool valid = false;
    {
      const py::gil_scoped_release release;
      valid = parts_.plan->run(memory, externals, 0, serial ? nullptr : check);
    }
    called(PyObject_CallOneArg(parts_.give_arena, arena.ptr()));
    if (valid) return result;
    return py::none();
  }

 private:
  static pybind11::object called(PyObject* result) {
    if (result == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
  }

  void* address(PyObject* tensor) const { return PyLong_AsVoidPtr(called(PyObject_CallOneArg(parts_.data_ptr, tensor)).ptr()); }

  bool like_before(PyObject* x, PyObject* plain) const {
    if (reinterpret_cast<PyObject*>(Py_TYPE(x)) != parts_.input_type) return false;
    if (!PyMethod_Check(plain) || PyMethod_GET_FUNCTION(plain) != parts_.function) return false;
    // First, since under some of them (a trace, a mode of torch functions) the questions about x would be seen.
    for (const Question& question : parts_.surroundings)
      if (!is(PyObject_CallNoArgs(question.ask), question.answer)) return false;
    for (const Question& question : parts_.attributes)
      if (!is(attribute(question.ask, x), question.answer)) return false;
    for (const Question& question : parts_.methods)
      if (!is(PyObject_CallOneArg(question.ask, x), question.answer)) return false;
    return same_epoch();
  }

  bool same_epoch() const {
    static PyObject* const name = PyUnicode_InternFromString("epoch");
    const Owned epoch(PyObject_GetAttr(parts_.optimizers, name));
    return epoch.get() != nullptr && is(PyObject_GetAttr(parts_.guard, name), epoch.get());
  }

  bool same_model(PyObject* model) const {
    static PyObject* const name = PyUnicode_InternFromString("__dict__");
    const Owned attributes(PyObject_GetAttr(model, name));
    return attributes.get() != nullptr && parts_.structure->same(model, attributes.get()) && parts_.weights->same() && same_epoch();
  }

  // Whether a new reference, or nullptr after a failure, is what is wanted or equals it.
  static bool is(PyObject* found, PyObject* wanted) {
    const Owned owned(found);
    if (found == nullptr || found == wanted) return found != nullptr;
    const int equal = PyObject_RichCompareBool(found, wanted, Py_EQ);
    if (equal < 0) forget_exception();
    return equal == 1;
  }

  Parts parts_;
};

}  // namespace fb

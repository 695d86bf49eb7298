// The Python face of the torch-free part: packing, single ops on raw addresses, the Plan runner, facts about the build.
// Tensors never pass here; the callers (kernels/, engine/) check them and keep them alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/isa.h"
#include "../cpu/map_memory/map_memory.h"
#include "../cpu/memory.h"
#include "../cpu/op.h"
#include "../cpu/plan.h"
#include "shortcut.h"
#include "watch.h"

namespace py = pybind11;

namespace {

fb::OpSpec spec_from(const std::string& kind, const py::dict& params) {
  fb::OpSpec spec;
  spec.kind = kind;
  const std::pair<const char*, int64_t*> fields[] = {
      {"n", &spec.n}, {"h", &spec.h}, {"w", &spec.w}, {"c", &spec.c}, {"k", &spec.k}, {"r", &spec.r}, {"s", &spec.s},
      {"stride_h", &spec.stride_h}, {"stride_w", &spec.stride_w}, {"pad_h", &spec.pad_h}, {"pad_w", &spec.pad_w},
      {"pad_bottom", &spec.pad_bottom}, {"pad_right", &spec.pad_right},
      {"dilation_h", &spec.dilation_h}, {"dilation_w", &spec.dilation_w}, {"groups", &spec.groups}, {"ldx", &spec.ldx}, {"ldy", &spec.ldy},
      {"ldr", &spec.ldr}, {"gated", &spec.gated}, {"ldg", &spec.ldg}, {"activation", &spec.activation}, {"act_from", &spec.act_from}, {"pre", &spec.pre},
      {"pre_activation", &spec.pre_activation}, {"depth_activation", &spec.depth_activation}, {"nchw_in", &spec.nchw_in}, {"ceil_mode", &spec.ceil_mode},
      {"count_include_pad", &spec.count_include_pad}, {"divisor", &spec.divisor}, {"out_h", &spec.out_h}, {"out_w", &spec.out_w}, {"size", &spec.size}, {"tile", &spec.tile},
      {"bf16", &spec.bf16}, {"real_points", &spec.real_points}};
  const std::pair<const char*, double*> reals[] = {{"alpha", &spec.alpha}, {"beta", &spec.beta}, {"offset", &spec.offset}, {"border", &spec.border}, {"eps", &spec.eps}};
  for (const auto& item : params) {
    const std::string key = py::cast<std::string>(item.first);
    bool known = false;
    for (const auto& [name, field] : fields) {
      if (key != name) continue;
      *field = py::cast<int64_t>(item.second);
      known = true;
    }
    for (const auto& [name, field] : reals) {
      if (key != name) continue;
      *field = py::cast<double>(item.second);
      known = true;
    }
    if (!known) throw py::value_error("unknown parameter '" + key + "' of " + kind);
  }
  return spec;
}

float* address(const py::dict& pointers, const char* name) {
  return pointers.contains(name) ? reinterpret_cast<float*>(py::cast<intptr_t>(pointers[name])) : nullptr;
}

fb::Place place(const py::dict& operands, const char* name) {
  if (!operands.contains(name)) return {};
  const auto pair = py::cast<std::pair<int, int64_t>>(operands[name]);
  return {pair.first, pair.second};
}

fb::Wait wait_from(int mode) {
  if (mode < 0 || mode > 2) throw py::value_error("dependency mode " + std::to_string(mode) + ", expected 0, 1 or 2");
  return static_cast<fb::Wait>(mode);
}

class Memory {
 public:
  explicit Memory(int64_t floats) : size_(floats) {
    if (floats < 1) throw py::value_error("Memory of " + std::to_string(floats) + " floats, expected 1 or more");
    floats_.reserve(floats);
  }
  float* data() { return floats_.reserve(size_); }
  int64_t size() const { return size_; }

 private:
  fb::AlignedFloats floats_;
  int64_t size_;
};

std::vector<void*> to_pointers(const std::vector<intptr_t>& addresses) {
  std::vector<void*> out;
  for (const intptr_t a : addresses) out.push_back(reinterpret_cast<void*>(a));
  return out;
}

using Pairs = std::vector<std::pair<py::object, py::object>>;

template <typename Objects>
std::vector<PyObject*> borrowed(const Objects& objects) {
  std::vector<PyObject*> found;
  for (const py::handle object : objects) found.push_back(object.ptr());
  return found;
}

void check_descriptor(const py::object& object) {
  if (Py_TYPE(object.ptr())->tp_descr_get == nullptr) throw py::type_error("expected an attribute of the class Tensor, got " + py::repr(object).cast<std::string>());
}

std::vector<fb::Shortcut::Question> questions(const Pairs& pairs) {
  std::vector<fb::Shortcut::Question> found;
  for (const auto& [ask, answer] : pairs) found.push_back({ask.ptr(), answer.ptr()});
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "fast_backbones native kernels: torch-free interface on raw addresses.";
  // What Python may ask of this library: raised with every change of an operator, a kind, a parameter or an operand, here and in _ext.py.
  m.attr("interface") = 15;
  m.def("isa", [] { return fb::isa_name(fb::isa()); }, "Instruction set in use: avx512, avx2 or portable.");
  m.def("detected_isa", [] { return fb::isa_name(fb::detected_isa()); });
  m.def("has_bf16", &fb::has_bf16, "Whether the kernels multiply bfloat16 pairs: AVX512-BF16, not capped by FB_MAX_ISA.");
  m.def("compiled_isas", &fb::compiled_isas);
  m.def("compiler", [] { return std::string(__VERSION__); });

  m.def("refusal", [](const std::string& kind, const py::dict& params) { return fb::refusal(spec_from(kind, params)); },
        "'' when the op can be made, else the sentence that says why not.");
  m.def("packed_floats", [](const std::string& kind, const py::dict& params) { return fb::packed_floats(spec_from(kind, params)); });
  m.def("pack_weight", [](const std::string& kind, const py::dict& params, intptr_t weight, intptr_t out) {
    const fb::OpSpec spec = spec_from(kind, params);
    const py::gil_scoped_release release;
    fb::pack_weight(spec, reinterpret_cast<const float*>(weight), reinterpret_cast<float*>(out));
  });
  m.def("run_op",
        [](const std::string& kind, const py::dict& params, const py::dict& pointers, int threads) {
          const fb::OpSpec spec = spec_from(kind, params);
          fb::Pointers p;
          p.x = address(pointers, "x");
          p.weight = address(pointers, "weight");
          p.scale = address(pointers, "scale");
          p.bias = address(pointers, "bias");
          p.residual = address(pointers, "residual");
          p.gate = address(pointers, "gate");
          p.pre_scale = address(pointers, "pre_scale");
          p.pre_shift = address(pointers, "pre_shift");
          p.depth_weight = address(pointers, "depth_weight");
          p.depth_bias = address(pointers, "depth_bias");
          p.y = address(pointers, "y");
          const py::gil_scoped_release release;
          fb::run_op(spec, p, threads);
        },
        py::arg("kind"), py::arg("params"), py::arg("pointers"), py::arg("threads") = 0);
  m.def("peak_gflops", &fb::peak_gflops, py::arg("seconds") = 0.2, py::arg("threads") = 0, py::arg("bf16") = false, py::call_guard<py::gil_scoped_release>());
  m.def("copy_gbps", &fb::copy_gbps, py::arg("seconds") = 0.2, py::arg("threads") = 0, py::call_guard<py::gil_scoped_release>());
  m.def("round_trip_ns", &fb::round_trip_ns, py::arg("seconds") = 0.02, py::call_guard<py::gil_scoped_release>());

  // Large tensors that the operators return, and what is kept for the next ones.
  m.def("map_memory", [] {
    const fb::map_memory::Usage usage = fb::map_memory::usage();
    return std::make_pair(usage.live, usage.held);
  });
  m.def("release_map_memory", &fb::map_memory::release, py::call_guard<py::gil_scoped_release>());

  // For the engine's guard. The caller keeps alive what these look at.
  py::class_<fb::Structure>(m, "Structure")
      .def(py::init([](const py::object& root, const py::dict& attributes, const py::str& ignored, const std::vector<py::object>& objects, const std::vector<py::dict>& dicts,
                       const std::vector<py::object>& containers, const std::vector<std::tuple<py::type, py::object, Pairs>>& classes) {
             std::vector<fb::Structure::Class> known;
             for (const auto& [type, space, methods] : classes) {
               known.push_back({type.ptr(), space.ptr(), {}});
               for (const auto& [name, value] : methods) known.back().methods.emplace_back(name.ptr(), value.ptr());
             }
             return fb::Structure(root.ptr(), attributes.ptr(), ignored.ptr(), borrowed(objects), borrowed(dicts), borrowed(containers), std::move(known));
           }),
           py::arg("root"), py::arg("attributes"), py::arg("ignored"), py::arg("objects"), py::arg("dicts"), py::arg("containers"), py::arg("classes"))
      .def("same", [](const fb::Structure& structure, const py::object& root, const py::dict& attributes) { return structure.same(root.ptr(), attributes.ptr()); },
           py::arg("root"), py::arg("attributes"),
           "Whether root, whose __dict__ is handed in, and everything else are what they were, by identity.");
  py::class_<fb::Weights>(m, "Weights")
      .def(py::init([](const std::vector<py::object>& tensors, const py::object& data_ptr, const py::object& version, const py::object& dtype, std::vector<intptr_t> lines, const std::vector<intptr_t>& addresses,
                       const std::vector<int64_t>& nbytes, int64_t samples) {
             check_descriptor(version);
             check_descriptor(dtype);
             return fb::Weights(borrowed(tensors), data_ptr.ptr(), version.ptr(), dtype.ptr(), std::move(lines), fb::Fingerprint(addresses, nbytes, samples));
           }),
           py::arg("tensors"), py::arg("data_ptr"), py::arg("version"), py::arg("dtype"), py::arg("lines"), py::arg("addresses"), py::arg("nbytes"), py::arg("samples"))
      .def("same", &fb::Weights::same, "Whether addresses, versions, dtypes and sampled values are what they were.");
  py::class_<fb::Shortcut>(m, "Shortcut")
      .def(py::init([](const Pairs& surroundings, const Pairs& attributes, const Pairs& methods, const py::type& input_type, const py::function& function,
                       const fb::Structure& structure, const fb::Weights& weights, const py::object& optimizers, const py::object& guard, const fb::Plan& plan,
                       const py::object& take_arena, const py::object& give_arena, const py::object& make_result, const py::object& data_ptr) {
             for (const auto& pair : attributes) check_descriptor(pair.first);
             return fb::Shortcut({questions(surroundings), questions(attributes), questions(methods), input_type.ptr(), function.ptr(), &structure, &weights, optimizers.ptr(),
                                  guard.ptr(), &plan, take_arena.ptr(), give_arena.ptr(), make_result.ptr(), data_ptr.ptr()});
           }),
           py::arg("surroundings"), py::arg("attributes"), py::arg("methods"), py::arg("input_type"), py::arg("function"), py::arg("structure"), py::arg("weights"),
           py::arg("optimizers"), py::arg("guard"), py::arg("plan"), py::arg("take_arena"), py::arg("give_arena"), py::arg("make_result"), py::arg("data_ptr"))
      .def("__call__", [](const fb::Shortcut& shortcut, const py::object& model, const py::object& x, const py::object& plain) { return shortcut(model.ptr(), x.ptr(), plain.ptr()); },
           "The result for x, or None where the long way has to be taken.");

  // Room for arenas and packed weights: floats on huge pages, seen by torch.frombuffer, which keeps the object alive.
  py::class_<Memory>(m, "Memory", py::buffer_protocol())
      .def(py::init<int64_t>(), py::arg("floats"))
      .def_buffer([](Memory& memory) { return py::buffer_info(memory.data(), memory.size()); });

  py::class_<fb::Plan>(m, "Plan")
      .def(py::init<>())
      .def("add",
           [](fb::Plan& plan, const std::string& kind, const py::dict& params, const py::dict& operands,
              const std::vector<std::pair<int, int>>& deps, const std::string& name) {
             std::vector<fb::Dependency> dependencies;
             for (const auto& [step, mode] : deps) dependencies.push_back({step, wait_from(mode)});
             return plan.add(spec_from(kind, params),
                             {place(operands, "x"), place(operands, "weight"), place(operands, "scale"), place(operands, "bias"), place(operands, "residual"), place(operands, "gate"),
                              place(operands, "pre_scale"), place(operands, "pre_shift"), place(operands, "depth_weight"), place(operands, "depth_bias"),
                              place(operands, "y")},
                             std::move(dependencies), name);
           },
           py::arg("kind"), py::arg("params"), py::arg("operands"), py::arg("deps"), py::arg("name"),
           "deps: (step, mode); mode 0 waits for the whole step, 1 for the rows of x the task reads, 2 for the rows of the residual.")
      .def("finish", &fb::Plan::finish)
      .def("__len__", &fb::Plan::size)
      .def_property_readonly("scratch_bytes", &fb::Plan::scratch_bytes)
      .def_property_readonly("shared_bytes", &fb::Plan::shared_bytes)
      .def("run",
           [](const fb::Plan& plan, intptr_t arena, const std::vector<intptr_t>& externals, int threads, const py::object& check) {
             const std::vector<void*> pointers = to_pointers(externals);
             std::function<bool()> with_gil;
             if (!check.is_none()) {
               with_gil = [&check] {
                 const py::gil_scoped_acquire acquire;
                 return py::cast<bool>(check());
               };
             }
             const py::gil_scoped_release release;
             return plan.run(reinterpret_cast<void*>(arena), pointers, threads, with_gil);
           },
           py::arg("arena"), py::arg("externals"), py::arg("threads") = 0, py::arg("check") = py::none(),
           "check() runs on the calling thread while the others already compute; when it is false the result is False, and y unfinished.")
      .def("profile",
           [](const fb::Plan& plan, intptr_t arena, const std::vector<intptr_t>& externals, int repeats, int threads) {
             std::vector<fb::StepTime> times;
             {
               const std::vector<void*> pointers = to_pointers(externals);
               const py::gil_scoped_release release;
               times = plan.profile(reinterpret_cast<void*>(arena), pointers, repeats, threads);
             }
             py::list out;
             for (const fb::StepTime& t : times) {
               py::dict row;
               row["name"] = t.name;
               row["kind"] = t.kind;
               row["ms"] = t.seconds * 1e3;
               row["gflops"] = t.flops / t.seconds * 1e-9;
               row["gbps"] = t.bytes / t.seconds * 1e-9;
               row["tasks"] = t.tasks;
               row["detail"] = t.detail;
               out.append(row);
             }
             return out;
           },
           py::arg("arena"), py::arg("externals"), py::arg("repeats") = 5, py::arg("threads") = 0)
      .def("costs", [](const fb::Plan& plan, int step) {
        const fb::StepTime facts = plan.facts(step);
        py::dict out;
        out["flops"] = facts.flops;
        out["bytes"] = facts.bytes;
        return out;
      });
}

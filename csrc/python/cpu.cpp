// What is not a tensor op: which instruction set variants this CPU can run, and how this build was made.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

struct Isa {
  const char* name;
  bool supported;
};

// Best first. __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
std::vector<Isa> isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  return {{"avx512_bf16", avx512_bf16}, {"avx512", avx512}, {"avx2", avx2}, {"portable", true}};
#else
  return {{"portable", true}};
#endif
}

std::vector<std::string> names(bool only_supported) {
  std::vector<std::string> result;
  for (const Isa& isa : isas())
    if (isa.supported || !only_supported) result.emplace_back(isa.name);
  return result;
}

std::string cpu_name() {
  std::string name;
#if defined(__x86_64__)
  for (unsigned leaf = 0x80000002u; leaf <= 0x80000004u; ++leaf) {
    unsigned r[4] = {};
    if (!__get_cpuid(leaf, &r[0], &r[1], &r[2], &r[3])) return "unknown";
    name.append(reinterpret_cast<const char*>(r), sizeof r);
  }
  name = name.c_str();  // up to the first zero byte
#endif
  return name.empty() ? "unknown" : name;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = "gcc-compatible " __VERSION__;
  info["built_isas"] = FASTGEN_BUILT_ISAS;
  info["torch_target"] = "2.11";
  return info;
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU detection and build information of fastgen.";
  m.def("known_isas", [] { return names(false); }, "All instruction set variants, best first.");
  m.def("supported_isas", [] { return names(true); }, "The variants that this CPU can run, best first.");
  m.def("cpu_name", &cpu_name, "The processor's brand string.");
  m.def("build_info", &build_info, "Compiler and variants of this build.");
}

// What is not a tensor op: which instruction set variants this CPU can run, and how this build was made.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

struct Isa {
  const char* name;
  bool supported;
};

#if defined(__x86_64__)
// Whether there are tiles of bfloat16, and the kernel lets this process use them: Linux wants to be asked (arch_prctl(2)), once for all
// threads, since their 8 KB are saved from then on at every switch that finds them in use.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned bf16 = 1u << 22, tile = 1u << 24;
  constexpr long request_permission = 0x1023, tile_data = 18;
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & bf16) == 0 || (d & tile) == 0) return false;
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

// Best first. __builtin_cpu_supports also asks the operating system whether it saves the wide registers.
std::vector<Isa> isas() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  static const bool amx = avx512_bf16 && has_amx();
  return {{"amx", amx}, {"avx512_bf16", avx512_bf16}, {"avx512", avx512}, {"avx2", avx2}, {"portable", true}};
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

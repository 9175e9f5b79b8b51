#include "cpu/isa.h"

#include <cstdlib>

#if defined(LONGATTN_HAVE_AMX_BF16) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "errors.h"

namespace longattn {

namespace baseline {
extern const Kernels table;
}
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
namespace amx_bf16 {
extern const Kernels table;
}
namespace neon {
extern const Kernels table;
}

namespace {

#if defined(LONGATTN_HAVE_AMX_BF16)
// Linux hands out the tile registers on request, once for the process.
bool has_amx() {
#if defined(__linux__)
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kBFloat16)) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

struct Isa {
  const char* name;
  const Kernels* table;
  bool usable;
};

// Fastest first.
std::vector<Isa> built() {
  std::vector<Isa> list;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  (void)has_avx512;
#endif
#if defined(LONGATTN_HAVE_AMX_BF16)
  list.push_back({"amx_bf16", &amx_bf16::table, has_avx512 && __builtin_cpu_supports("avx512bf16") && has_amx()});
#endif
#if defined(LONGATTN_HAVE_AVX512)
  list.push_back({"avx512", &avx512::table, has_avx512});
#endif
#if defined(LONGATTN_HAVE_AVX512_BF16)
  // VDPBF16PS does twice the work of a float32 FMA in the same time on AMD's processors, half of it on Intel's.
  list.insert(__builtin_cpu_is("amd") && !list.empty() ? list.end() - 1 : list.end(),
              {"avx512_bf16", &avx512_bf16::table, has_avx512 && __builtin_cpu_supports("avx512bf16")});
#endif
#if defined(LONGATTN_HAVE_AVX2)
  list.push_back({"avx2", &avx2::table, has_avx2});
#endif
#if defined(LONGATTN_HAVE_NEON)
  list.push_back({"neon", &neon::table, true});
#endif
#if defined(LONGATTN_HAVE_BASELINE)
  list.push_back({"baseline", &baseline::table, true});
#endif
  return list;
}

// The fastest that is usable if no name is wanted.
Isa find(const char* argument, const std::string& wanted) {
  std::string names;
  for (const Isa& isa : built()) {
    if (!isa.usable) continue;
    if (wanted.empty() || wanted == isa.name) return isa;
    names += (names.empty() ? "" : ", ") + std::string(isa.name);
  }
  throw InvalidInput(argument, "one of " + names, wanted);
}

const Isa& chosen() {
  constexpr const char* kVariable = "LONGATTN_CPU_ISA";
  static const Isa isa = [] {
    const char* wanted = std::getenv(kVariable);
    return find(kVariable, wanted ? wanted : "");
  }();
  return isa;
}

}  // namespace

const Kernels& kernels() { return *chosen().table; }

std::string isa() { return chosen().name; }

const Kernels& kernels(const std::string& name) { return name.empty() ? kernels() : *find("isa", name).table; }

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : built())
    if (isa.usable) names.push_back(isa.name);
  return names;
}

}  // namespace longattn

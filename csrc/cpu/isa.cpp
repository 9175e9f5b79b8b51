#include "cpu/isa.h"

#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(LONGATTN_HAVE_AMX_BF16) && defined(__linux__)
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

#if defined(__x86_64__)
// What the processor has and the operating system saves. Compilers differ in the names that __builtin_cpu_supports
// knows (clang 14 and GCC 10 know no "f16c"), CPUID does not: Intel's manual, volume 2A, CPUID; volume 1, 13.3 for
// XCR0.
struct Features {
  bool avx2, avx512, avx512_bf16, amx_bf16;
};

constexpr bool has(unsigned long long bits, unsigned long long wanted) { return (bits & wanted) == wanted; }
constexpr unsigned bit(int n) { return 1u << n; }

Features features() {
  unsigned a, b, c, d, extended_b, extended_d;
  constexpr unsigned kFma = bit(12), kOsXsave = bit(27), kAvx = bit(28), kF16c = bit(29);
  if (!__get_cpuid(1, &a, &b, &c, &d) || !has(c, kFma | kOsXsave | kAvx | kF16c)) return {};
  if (!__get_cpuid_count(7, 0, &a, &extended_b, &c, &extended_d)) return {};
  const bool has_bfloat16 = a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && has(a, bit(5));

  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kYmm = bit(1) | bit(2), kZmm = kYmm | bit(5) | bit(6) | bit(7), kTiles = bit(17) | bit(18);
  constexpr unsigned kF = bit(16), kDq = bit(17), kBw = bit(30), kVl = bit(31);
  constexpr unsigned kAmxBf16 = bit(22), kAmxTile = bit(24);
  Features found{};
  found.avx2 = has(low, kYmm) && has(extended_b, bit(5));
  found.avx512 = found.avx2 && has(low, kZmm) && has(extended_b, kF | kDq | kBw | kVl);
  found.avx512_bf16 = found.avx512 && has_bfloat16;
  found.amx_bf16 = found.avx512_bf16 && has(low, kTiles) && has(extended_d, kAmxBf16 | kAmxTile);
  return found;
}
#endif

#if defined(LONGATTN_HAVE_AMX_BF16)
// Linux hands out the tile registers on request, once for the process.
bool may_use_tiles() {
#if defined(__linux__)
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
  const Features cpu = features();
  (void)cpu;
#endif
#if defined(LONGATTN_HAVE_AMX_BF16)
  list.push_back({"amx_bf16", &amx_bf16::table, cpu.amx_bf16 && may_use_tiles()});
#endif
#if defined(LONGATTN_HAVE_AVX512)
  list.push_back({"avx512", &avx512::table, cpu.avx512});
#endif
#if defined(LONGATTN_HAVE_AVX512_BF16)
  // VDPBF16PS does twice the work of a float32 FMA in the same time on AMD's processors, half of it on Intel's.
  __builtin_cpu_init();
  list.insert(__builtin_cpu_is("amd") && !list.empty() ? list.end() - 1 : list.end(),
              {"avx512_bf16", &avx512_bf16::table, cpu.avx512_bf16});
#endif
#if defined(LONGATTN_HAVE_AVX2)
  list.push_back({"avx2", &avx2::table, cpu.avx2});
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

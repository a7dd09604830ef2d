#include "isa.h"

#include <cstring>

#include "hanlin_cpu.h"

#if defined(__x86_64__) || defined(_M_X64)
#if defined(_MSC_VER)
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

// The build names every variant it compiled: HL_VARIANTS(V) is V(amx) V(avx512_bf16) ... V(portable).
#include "variants.h"

namespace hl {

#define HL_DECLARE(name)                   \
  namespace name {                         \
  extern const LinearKernels linear_table; \
  extern const OpKernels op_table;         \
  }
HL_VARIANTS(HL_DECLARE)
#undef HL_DECLARE

namespace {

#if defined(__x86_64__) || defined(_M_X64)

struct Features {
  bool avx2 = false, avx_vnni = false, avx512 = false, avx512_vnni = false, avx512_bf16 = false, amx = false;
};

// Linux grants a process the registers of AMX's tiles when it asks; to all its threads, now and for good.
bool tiles_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, ask, tile_data) == 0;
#else
  return false;
#endif
}

void cpuid(unsigned leaf, unsigned subleaf, unsigned out[4]) {
#if defined(_MSC_VER)
  __cpuidex(reinterpret_cast<int*>(out), static_cast<int>(leaf), static_cast<int>(subleaf));
#else
  __cpuid_count(leaf, subleaf, out[0], out[1], out[2], out[3]);
#endif
}

unsigned long long saved_state() {  // which registers the system saves
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<unsigned long long>(high) << 32) | low;
#endif
}

Features detect() {
  enum { a, b, c, d };
  Features f;
  unsigned r[4];
  cpuid(0, 0, r);
  if (r[a] < 7) return f;
  cpuid(1, 0, r);
  const bool xsave = r[c] >> 27 & 1, fma = r[c] >> 12 & 1, f16c = r[c] >> 29 & 1;
  if (!xsave || !fma || !f16c) return f;
  const unsigned long long state = saved_state();
  if ((state & 0x6) != 0x6) return f;
  unsigned r7[4], r71[4] = {0, 0, 0, 0};
  cpuid(7, 0, r7);
  if (r7[a] >= 1) cpuid(7, 1, r71);
  f.avx2 = r7[b] >> 5 & 1;
  f.avx_vnni = f.avx2 && (r71[a] >> 4 & 1);
  const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  f.avx512 = f.avx2 && (state & 0xE0) == 0xE0 && (r7[b] & wanted) == wanted;
  f.avx512_vnni = f.avx512 && (r7[c] >> 11 & 1);
  f.avx512_bf16 = f.avx512_vnni && (r71[a] >> 5 & 1);
  const unsigned tiles = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, TILE, INT8
  f.amx = f.avx512_bf16 && (r7[d] & tiles) == tiles && (state & 0x60000) == 0x60000;
  return f;
}

[[maybe_unused]] bool has_amx() { return detect().amx && tiles_granted(); }
[[maybe_unused]] bool has_avx512_bf16() { return detect().avx512_bf16; }
[[maybe_unused]] bool has_avx512_vnni() { return detect().avx512_vnni; }
[[maybe_unused]] bool has_avx512() { return detect().avx512; }
[[maybe_unused]] bool has_avx2_vnni() { return detect().avx_vnni; }
[[maybe_unused]] bool has_avx2() { return detect().avx2; }

#elif defined(__aarch64__)

[[maybe_unused]] bool has_neon() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#else
  return true;  // every Apple silicon has it
#endif
}

#endif

bool has_portable() { return true; }

constexpr Isa table[] = {
#define HL_ROW(name) {#name, has_##name, &name::linear_table, &name::op_table},
    HL_VARIANTS(HL_ROW)
#undef HL_ROW
};
constexpr int table_size = sizeof table / sizeof table[0];

}  // namespace

const Isa* isa_list(int* count) {
  *count = table_size;
  return table;
}

const Isa* isa_find(const char* name, const char** problem) {
  *problem = "is not known to this build";
  for (const Isa& isa : table) {
    if (name != nullptr && std::strcmp(name, isa.name) != 0) continue;
    if (isa.supported()) return &isa;
    *problem = "is not supported by this CPU";
  }
  return nullptr;
}

}  // namespace hl

extern "C" int32_t hl_isa_count(void) { return hl::table_size; }
extern "C" const char* hl_isa_list(int32_t index) {
  return index >= 0 && index < hl::table_size ? hl::table[index].name : nullptr;
}
extern "C" int32_t hl_isa_supported(const char* name) {
  const char* problem;
  return name != nullptr && hl::isa_find(name, &problem) != nullptr;
}

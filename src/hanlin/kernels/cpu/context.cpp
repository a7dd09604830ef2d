// Contexts and memory: the part of the C ABI that computes nothing.
#include "context.h"

#if defined(_WIN32)
#include <malloc.h>
#elif !defined(__SANITIZE_ADDRESS__)
#include <sys/mman.h>
#endif

#include <cstring>

namespace {

[[maybe_unused]] constexpr int64_t huge_page = int64_t{2} << 20;
constexpr int32_t most_threads = 1024;

}  // namespace

extern "C" int32_t hl_open(int32_t threads, const char* isa, hl_ctx** ctx) {
  if (ctx == nullptr) return hl::fail(HL_ERR_ARGUMENT, "hl_open: no place for the context");
  *ctx = nullptr;
  if (threads < 1 || threads > most_threads)
    return hl::fail(HL_ERR_ARGUMENT, "threads must be in 1..%d, not %d", most_threads, threads);
  return hl::guarded([&]() -> int32_t {
    const char* problem = nullptr;
    const hl::Isa* found = hl::isa_find(isa, &problem);
    if (found == nullptr) return hl::fail(HL_ERR_ISA, "instruction set '%s' %s", isa, problem);
    *ctx = new hl_ctx(threads, found);
    return HL_OK;
  });
}

extern "C" void hl_close(hl_ctx* ctx) { delete ctx; }
extern "C" const char* hl_isa_name(const hl_ctx* ctx) { return ctx->isa->name; }
extern "C" int32_t hl_threads(const hl_ctx* ctx) { return ctx->pool.size(); }

extern "C" int32_t hl_sums(const uint64_t* words, int64_t rows, int64_t columns, uint64_t* row_sums,
                           uint64_t* column_sums) {
  if (rows < 0 || columns < 0 || ((words == nullptr || column_sums == nullptr) && rows * columns > 0) ||
      (row_sums == nullptr && rows > 0))
    return hl::fail(HL_ERR_ARGUMENT, "hl_sums: bad arguments");
  uint64_t* __restrict to = column_sums;  // else it could be among the words, and nothing is done four at a time
  for (int64_t r = 0; r < rows; ++r, words += columns) {
    uint64_t sum = 0;
    for (int64_t c = 0; c < columns; ++c) {
      sum += words[c];
      to[c] += words[c];
    }
    row_sums[r] = sum;
  }
  return HL_OK;
}

#if defined(_WIN32) || defined(__SANITIZE_ADDRESS__)  // the sanitizer watches the ends of what malloc gives

extern "C" int32_t hl_alloc(int64_t bytes, void** memory) {
  if (memory == nullptr || bytes < 0) return hl::fail(HL_ERR_ARGUMENT, "hl_alloc: bad arguments");
  *memory = nullptr;
  if (bytes == 0) return HL_OK;
#if defined(_WIN32)
  *memory = _aligned_malloc(static_cast<size_t>(bytes), 64);
#else
  if (posix_memalign(memory, bytes >= huge_page / 2 ? huge_page : 64, static_cast<size_t>(bytes)) != 0)
    *memory = nullptr;
#endif
  if (*memory == nullptr) return hl::fail(HL_ERR_MEMORY, "no %lld bytes of memory", static_cast<long long>(bytes));
  std::memset(*memory, 0, static_cast<size_t>(bytes));
  return HL_OK;
}

extern "C" void hl_free(void* memory, int64_t) {
#if defined(_WIN32)
  _aligned_free(memory);
#else
  free(memory);
#endif
}

#else

extern "C" int32_t hl_alloc(int64_t bytes, void** memory) {
  if (memory == nullptr || bytes < 0) return hl::fail(HL_ERR_ARGUMENT, "hl_alloc: bad arguments");
  *memory = nullptr;
  if (bytes == 0) return HL_OK;
  const int64_t slack = bytes >= huge_page / 2 ? huge_page : 0;
  void* raw = MAP_FAILED;
  if (bytes <= INT64_MAX - slack)
    raw = mmap(nullptr, static_cast<size_t>(bytes + slack), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return hl::fail(HL_ERR_MEMORY, "no %lld bytes of memory", static_cast<long long>(bytes));
  char* begin = static_cast<char*>(raw);
  if (slack > 0) {  // give back what lies before and behind the aligned part; hl_free then unmaps exactly `bytes`
    char* aligned =
        begin + (huge_page - static_cast<int64_t>(reinterpret_cast<uintptr_t>(begin) % huge_page)) % huge_page;
    const auto page = static_cast<uintptr_t>(4096);
    char* end = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(aligned + bytes) + page - 1) / page * page);
    char* raw_end =
        reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(begin + bytes + slack) + page - 1) / page * page);
    if (aligned > begin) munmap(begin, static_cast<size_t>(aligned - begin));
    if (raw_end > end) munmap(end, static_cast<size_t>(raw_end - end));
    begin = aligned;
#if defined(MADV_HUGEPAGE)
    madvise(begin, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  }
  *memory = begin;
  return HL_OK;
}

extern "C" void hl_free(void* memory, int64_t bytes) {
  if (memory != nullptr) munmap(memory, static_cast<size_t>(bytes));
}

#endif

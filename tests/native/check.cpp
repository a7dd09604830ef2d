// Drives the CPU library through its C ABI, to be built with a sanitizer: several contexts, several callers, more
// threads than cores, sleeping workers, fork; compares instruction sets. Prints what went wrong and exits with 1.
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "hanlin_cpu.h"

namespace {

void must(int32_t status, const char* what) {
  if (status == HL_OK) return;
  std::printf("%s: %s\n", what, hl_last_error());
  std::exit(1);
}

struct Case {
  int32_t kind, group;
};
constexpr Case cases[] = {{HL_F32, 0},   {HL_BF16, 0},      {HL_INT8_ROW, 0},   {HL_INT8, 32},
                          {HL_INT4, 64}, {HL_INT4_MIN, 32}, {HL_INT4_ZERO, 128}};
constexpr int64_t out = 75, in = 256;

std::vector<float> numbers(int64_t n, uint32_t seed) {
  std::vector<float> values(static_cast<size_t>(n));
  for (auto& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<int32_t>(seed >> 8) - (1 << 23)) / (1 << 23);
  }
  return values;
}

struct Weight {
  Weight(hl_ctx* ctx, Case c, const std::vector<float>& matrix) : size(hl_packed_bytes(c.kind, out, in, c.group)) {
    w = {c.kind, c.group, out, in, nullptr};
    must(hl_alloc(size, &w.data), "alloc");
    must(hl_pack(ctx, &w, HL_SRC_F32, matrix.data(), out, 0, nullptr, nullptr), "pack");
  }
  ~Weight() { hl_free(w.data, size); }
  Weight(const Weight&) = delete;
  Weight& operator=(const Weight&) = delete;
  int64_t size;
  hl_weight w;
};

std::vector<float> product(hl_ctx* ctx, const Weight& weight, const std::vector<float>& x) {
  const int64_t rows = static_cast<int64_t>(x.size()) / in;
  std::vector<float> y(static_cast<size_t>(rows * out));
  must(hl_linear(ctx, &weight.w, x.data(), in, rows, y.data(), out, nullptr, 0), "linear");
  return y;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

// Integer kinds give the same bits on every instruction set, float kinds nearly the same numbers.
bool agree(int32_t kind, const std::vector<float>& a, const std::vector<float>& b) {
  if (kind >= HL_INT8_ROW) return same(a, b);
  for (size_t i = 0; i < a.size(); i++)
    if (!(std::fabs(a[i] - b[i]) < 1e-4f)) return false;
  return true;
}

bool check(const char* isa) {
  const auto matrix = numbers(out * in, 1), x = numbers(17 * in, 2);
  hl_ctx *one, *four, *plain;
  must(hl_open(1, "portable", &plain), "open");
  must(hl_open(1, isa, &one), "open");
  must(hl_open(4, isa, &four), "open");
  bool good = true;
  for (const Case c : cases) {
    const Weight weight(one, c, matrix), again(four, c, matrix);
    const auto expected = product(one, weight, x);
    if (!agree(c.kind, expected, product(plain, weight, x))) {
      std::printf("%s: kind %d differs from portable\n", isa, c.kind);
      good = false;
    }
    std::vector<std::thread> callers;
    std::vector<int> results(3, 0);
    for (size_t i = 0; i < results.size(); i++)
      callers.emplace_back([&, i] {
        for (int n = 0; n < 20; n++) {
          results[i] += same(product(i == 0 ? one : four, again, x), expected);
          if (n % 8 == 0) std::this_thread::sleep_for(std::chrono::microseconds(500));  // the workers go to sleep
        }
      });
    for (auto& caller : callers) caller.join();
    for (const int result : results) good &= result == 20;
  }
#if !defined(_WIN32) && !defined(__SANITIZE_THREAD__)  // the thread sanitizer does not follow threads of a forked child
  const Weight weight(one, cases[3], matrix);
  const auto expected = product(four, weight, x);
  const pid_t child = fork();
  if (child == 0) _exit(same(product(four, weight, x), expected) ? 0 : 1);
  int status = 1;
  waitpid(child, &status, 0);
  good &= status == 0;
#endif
  hl_close(plain);
  hl_close(one);
  hl_close(four);
  if (!good) std::printf("%s: results differ\n", isa);
  return good;
}

}  // namespace

int main() {
  bool good = true;
  for (int32_t i = 0; hl_isa_list(i) != nullptr; i++)
    if (hl_isa_supported(hl_isa_list(i))) good &= check(hl_isa_list(i));
  return good ? 0 : 1;
}

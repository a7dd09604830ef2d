// Sharing out a phase of work among threads some of which may be late, or lose their core to another program: nobody
// waits for a thread, only for work. A late thread finds what it would have done done, and catches up.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace hl {

// `chunks` pieces of work. Every rank owns a contiguous part of them and takes it in order, which costs it no more than
// a look into its own cache; then it helps the others.
class Shares {
 public:
  void open(int ranks) { cursors_.reset(new Cursor[static_cast<size_t>(ranks)]); }

  // Before the threads begin.
  void reset(int64_t chunks, int ranks) {
    chunks_ = static_cast<int32_t>(chunks);
    done_.store(0, std::memory_order_relaxed);
    for (int r = 0; r < ranks; r++) {
      cursors_[static_cast<size_t>(r)].next.store(static_cast<int32_t>(chunks * r / ranks), std::memory_order_relaxed);
      cursors_[static_cast<size_t>(r)].end = static_cast<int32_t>(chunks * (r + 1) / ranks);
    }
  }

  // body(chunk) for every chunk that this thread gets.
  template <class Body>
  void work(int rank, int ranks, const Body& body) {
    int32_t mine = 0;
    for (int i = 0; i < ranks; i++) {
      Cursor& cursor = cursors_[static_cast<size_t>((rank + i) % ranks)];
      while (cursor.next.load(std::memory_order_relaxed) < cursor.end) {
        const int32_t chunk = cursor.next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= cursor.end) break;
        body(chunk);
        mine++;
      }
    }
    if (mine > 0) done_.fetch_add(mine, std::memory_order_acq_rel);
  }

  // Until all chunks are done, whoever does them; what they wrote is then visible.
  void wait() const {
    for (int spins = 0; done_.load(std::memory_order_acquire) != chunks_; spins++) {
      constexpr int patience = 512;  // some 10 microseconds: who takes longer has lost his core, perhaps to us
      if (spins > patience) std::this_thread::yield();
#if defined(__x86_64__) || defined(_M_X64)
      _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
      __asm__ __volatile__("yield");
#endif
    }
  }

 private:
  struct alignas(64) Cursor {
    std::atomic<int32_t> next{0};
    int32_t end = 0;
  };
  std::unique_ptr<Cursor[]> cursors_;
  alignas(64) std::atomic<int32_t> done_{0};
  int32_t chunks_ = 0;
};

}  // namespace hl

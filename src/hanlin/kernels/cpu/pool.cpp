#include "pool.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif
#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__linux__)
#include <time.h>
#endif

namespace hl {
namespace {

// How long an idle thread spins before it sleeps: longer than the gaps between the operations of a step, shorter than
// anything a user would see as a busy core. A wake-up from sleep costs some 10 to 50 microseconds.
constexpr auto spin_time = std::chrono::microseconds(100);

inline void relax() {
#if defined(__x86_64__) || defined(_M_X64)
  _mm_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  __asm__ __volatile__("yield");
#endif
}

inline int64_t process_id() {
#if defined(_WIN32)
  return 0;
#else
  return getpid();
#endif
}

// Seconds that this thread has run, where the system tells; what it waited for a core does not count.
#if defined(__linux__) && defined(CLOCK_THREAD_CPUTIME_ID)
constexpr bool tells_run_time = true;
inline double run_time() {
  timespec t;
  return clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t) == 0 ? double(t.tv_sec) + 1e-9 * double(t.tv_nsec) : 0.0;
}
#else
constexpr bool tells_run_time = false;
inline double run_time() { return 0.0; }
#endif
inline double wall_time() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Rounding and denormals as IEEE has them while it lives: a caller that flushes denormals to zero would otherwise
// compute other bits in rank 0 than the workers do.
class PlainFloats {
#if defined(__x86_64__) || defined(_M_X64)
 public:
  PlainFloats() : saved_(_mm_getcsr()) { _mm_setcsr(0x1F80); }
  ~PlainFloats() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#elif defined(__aarch64__) && defined(__GNUC__)
 public:
  PlainFloats() {
    __asm__ __volatile__("mrs %0, fpcr" : "=r"(saved_));
    __asm__ __volatile__("msr fpcr, %0" : : "r"(uint64_t{0}));
  }
  ~PlainFloats() { __asm__ __volatile__("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#else
 public:
  PlainFloats() {}
#endif
};

}  // namespace

// What this thread has seen of its time while it had work or waited awake.
struct Watch {
  double wall = 0, ran = 0;         // when it last looked, woke or began
  double passed = 0, had_core = 0;  // since neighbours were last judged

  void start() { wall = wall_time(), ran = run_time(); }
  void look() {
    const double wall_before = wall, ran_before = ran;
    start();
    passed += wall - wall_before;
    had_core += ran - ran_before;
  }
};
thread_local Watch watch;

struct Pool::State {
  explicit State(int n)
      : size(n), can_spin(static_cast<unsigned>(n) <= std::thread::hardware_concurrency()), pid(process_id()) {}

  // Starts the workers; when the system refuses one, stops the others before the exception goes on.
  void start(Pool* pool) {
    try {
      for (int rank = 1; rank < size; rank++) threads.emplace_back([this, pool, rank] { work(pool, rank); });
    } catch (...) {
      stop();
      throw;
    }
  }

  void stop() {
    call = nullptr;
    set(epoch, epoch.load(std::memory_order_relaxed) + 1);
    for (auto& thread : threads) thread.join();
    threads.clear();
  }

  void work(Pool* pool, int rank) {
    for (uint32_t seen = 0;;) {
      seen = await(epoch, seen);
      if (call == nullptr) return;
      call(body, Team{rank, size, pool});
      barrier();
    }
  }

  void barrier() {
    const uint32_t now = phase.load(std::memory_order_relaxed);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
      arrived.store(0, std::memory_order_relaxed);
      set(phase, now + 1);
    } else {
      await(phase, now);
    }
  }

  // Waits until `word` is not `old` and returns it: spins, then sleeps.
  //
  // Where others want these cores too, spinning uses up the time that the thread will need when it has work again, and
  // giving way (yield) costs a whole slice of it: then it sleeps nearly at once. (Two busy neighbours on two cores: 435
  // tokens/s alone; 33 spinning and giving way, 113 spinning, 232 sleeping at once. Alone, sleeping at once: 173.)
  uint32_t await(const std::atomic<uint32_t>& word, uint32_t old) {
    if (can_spin) {
      const int tries = crowded() ? 32 : 256;
      for (int i = 0; i < tries; i++) {
        const uint32_t value = word.load(std::memory_order_acquire);
        if (value != old) return value;
        relax();
      }
      look_around();
      const auto end = std::chrono::steady_clock::now() + spin_time;
      while (!crowded() && std::chrono::steady_clock::now() < end) {
        for (int i = 0; i < 16; i++) {
          const uint32_t value = word.load(std::memory_order_acquire);
          if (value != old) return value;
          relax();
        }
        if (!tells_run_time) std::this_thread::yield();
      }
    }
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1);  // before the last look at `word`, so that either we see its change or set() sees us
    uint32_t value;
    while ((value = word.load()) == old) changed.wait(lock);
    sleepers.fetch_sub(1);
    watch.start();  // what was slept is no loss
    return value;
  }

  // Neighbours are noticed by the time they take. How often they interrupt would not tell: this process's own threads
  // do so for moments in every step, and took a machine for crowded that was not (16 sequences: 26 ms a step, not 11).
  bool crowded() const { return lost.load(std::memory_order_relaxed) > 0.2f; }

  void look_around() {
    watch.look();
    if (watch.passed < 20e-3) return;  // the system's own interruptions last up to some milliseconds
    const float share = tells_run_time ? static_cast<float>(1.0 - watch.had_core / watch.passed) : 0.0f;
    watch.passed = watch.had_core = 0;
    lost.store(std::max(share, 0.8f * lost.load(std::memory_order_relaxed)), std::memory_order_relaxed);
  }

  void set(std::atomic<uint32_t>& word, uint32_t value) {
    word.store(value);
    if (sleepers.load() == 0) return;
    {
      std::lock_guard<std::mutex> lock(mutex);
    }  // whoever is between its last look and its sleep gets there first
    changed.notify_all();
  }

  const int size;
  const bool can_spin;
  const int64_t pid;
  Erased call = nullptr;  // this and body: written before `epoch` changes, read after
  const void* body = nullptr;
  std::vector<std::thread> threads;
  alignas(64) std::atomic<uint32_t> epoch{0};
  alignas(64) std::atomic<uint32_t> phase{0};
  alignas(64) std::atomic<int> arrived{0};
  alignas(64) std::atomic<int> sleepers{0};
  std::atomic<float> lost{0.0f};  // the share of their time that threads lately waited for a core
  std::mutex mutex;
  std::condition_variable changed;
};

Pool::Pool(int threads) : state_(new State(threads)) { state_->start(this); }

Pool::~Pool() {
  if (state_->pid == process_id()) state_->stop();
  else
    static_cast<void>(state_.release());  // a forked child has no workers to stop; their handles must not be destroyed
}

int Pool::size() const { return state_->size; }

void Pool::run_erased(Erased call, const void* body) {
  if (state_->pid != process_id()) {
    auto fresh = std::make_unique<State>(state_->size);
    fresh->start(this);
    static_cast<void>(state_.release());
    state_ = std::move(fresh);
  }
  const PlainFloats plain;
  State& s = *state_;
  watch.start();  // what the caller did before is none of ours
  s.call = call;
  s.body = body;
  s.set(s.epoch, s.epoch.load(std::memory_order_relaxed) + 1);
  call(body, Team{0, s.size, this});
  s.barrier();
}

Range Team::split(int64_t n, int64_t grain) const {
  const int64_t units = (n + grain - 1) / grain;
  const int64_t begin = units * rank / size * grain, end = units * (rank + 1) / size * grain;
  return {begin < n ? begin : n, end < n ? end : n};
}

void Team::barrier() const {
  if (size > 1) pool->state_->barrier();
}

}  // namespace hl

// A thread pool whose threads run one body together, with barriers inside it ("single program, multiple data").
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

namespace hl {

struct Range {
  int64_t begin, end;
};

class Pool;

// One thread's view of the running body.
struct Team {
  int rank = 0, size = 1;
  Pool* pool = nullptr;

  // Waits until every thread of the team is here; what they wrote before is then visible to all.
  void barrier() const;

  // This thread's share of 0..n: contiguous, in units of `grain`, as even as those allow. It depends on nothing but its
  // arguments.
  Range split(int64_t n, int64_t grain = 1) const;
};

// `run` wakes the workers and is rank 0 itself. Idle workers spin for a short while, then sleep in the kernel, so they
// do not fight with other pools of the process. One caller at a time (hl_ctx sees to that). After fork() the child
// starts its own workers at its first run. Denormals and rounding are IEEE's inside a body, whatever the caller's
// thread has set.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int size() const;

  // body(const Team&) on every thread; it must not throw and must not call run().
  template <class Body>
  void run(const Body& body) {
    run_erased([](const void* b, const Team& team) { (*static_cast<const Body*>(b))(team); }, &body);
  }

 private:
  friend struct Team;
  struct State;
  using Erased = void (*)(const void*, const Team&);
  void run_erased(Erased call, const void* body);
  std::unique_ptr<State> state_;
};

}  // namespace hl

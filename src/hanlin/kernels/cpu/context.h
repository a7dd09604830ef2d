// What hl_ctx holds, and how the C ABI keeps exceptions in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <new>
#include <system_error>

#include "error.h"
#include "isa.h"
#include "pool.h"

namespace hl {

// Memory aligned to 64 bytes that only grows; its content is lost when it does.
class Scratch {
 public:
  Scratch() = default;
  ~Scratch() { hl_free(data_, size_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // At least `bytes` bytes. Throws std::bad_alloc.
  void* reserve(int64_t bytes) {
    if (bytes > size_) {
      hl_free(data_, size_);
      data_ = nullptr;
      size_ = 0;
      if (hl_alloc(bytes, &data_) != HL_OK) throw std::bad_alloc();
      size_ = bytes;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  int64_t size_ = 0;
};

// Calls body() -> status; what it throws becomes a status.
template <class Body>
int32_t guarded(const Body& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return fail(HL_ERR_MEMORY, "out of memory");
  } catch (const std::system_error& error) {
    return fail(HL_ERR_MEMORY, "the system refused a thread: %s", error.what());
  } catch (const std::exception& error) {
    return fail(HL_ERR_INTERNAL, "%s", error.what());
  }
}

}  // namespace hl

struct hl_ctx {
  hl_ctx(int threads, const hl::Isa* which) : isa(which), pool(threads) {}

  const hl::Isa* const isa;
  hl::Pool pool;
  std::mutex busy;  // held by whatever uses pool or scratch
  hl::Scratch scratch;
};

#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace hl {
namespace {
thread_local char message[512] = "";
}

int32_t fail(hl_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace hl

extern "C" int32_t hl_abi_version(void) { return HL_ABI_VERSION; }
extern "C" const char* hl_last_error(void) { return hl::message; }

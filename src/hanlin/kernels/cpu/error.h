// Failing calls leave a message behind, one a thread.
#pragma once

#include <cstdint>

#include "hanlin_cpu.h"

namespace hl {

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
int32_t fail(hl_status status, const char* format, ...);  // remembers the message, returns the status

}  // namespace hl

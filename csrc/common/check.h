// Errors of the kernels: a sentence that names the op and the argument. torch's own macro puts the function, and the file by its
// path on the machine that built it, before that.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastgen {

template <class... Parts>
[[noreturn]] __attribute__((cold, noinline)) void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace fastgen

// The parts of the message are put together only where the condition does not hold.
#define FASTGEN_CHECK(condition, ...)                              \
  do {                                                             \
    if (!(condition)) [[unlikely]] ::fastgen::fail(__VA_ARGS__);   \
  } while (0)

#include "server/program/terminate.h"

#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <new>
#include <system_error>

#include "server/program/exit_code.h"

namespace headstart {
namespace {

// Allocates nothing.
[[noreturn]] void GiveUp(const char* what) {
  std::fprintf(stderr, "headstart: can't go on: %s\n", what);
  std::fflush(stderr);
  _exit(kExitRuntime);
}

[[noreturn]] void OnTerminate() {
  try {
    if (const std::exception_ptr exception = std::current_exception()) {
      std::rethrow_exception(exception);
    }
  } catch (const std::bad_alloc&) {
    GiveUp("out of memory");
  } catch (const std::system_error& error) {
    GiveUp(error.what());
  } catch (...) {  // a fault of the program: to be seen as one
  }
  std::abort();
}

}  // namespace

void EndWhereResourcesLack() { std::set_terminate(OnTerminate); }

}  // namespace headstart

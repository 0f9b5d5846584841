// Where every thread of this process is, for a log that is read when the process has gone.
#pragma once

#include <string>

#include "absl/time/time.h"

namespace headstart {

// Stacks of all threads: number, name, and functions from the innermost out, as far as their names
// are known. Interrupts each thread for a moment, with a signal that it installs for good (SIGRTMIN
// + 7). A thread that does not answer within `patience`, because it waits in the kernel where
// nothing can interrupt it, is named with what /proc says of that wait. One at a time.
std::string AllStacks(absl::Duration patience);

}  // namespace headstart

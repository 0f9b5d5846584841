// What ran on the GPU and when: every kernel and copy of this process, through CUPTI's activity
// records.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace headstart {

// Records from now on. One recording at a time.
absl::Status StartKernelTrace();

// Ends the recording and writes it, a JSON object a line: {"name", "stream", "start_ns", "end_ns",
// "bytes"}. Copies are called "copy HtoD", "copy DtoH" and so on; kernels have 0 bytes.
absl::Status WriteKernelTrace(const std::string& path);

}  // namespace headstart

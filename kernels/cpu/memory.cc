#include "kernels/cpu/memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

constexpr int64_t kAlignmentBytes = 64;
constexpr int64_t kHugePageBytes = int64_t{2} << 20;

}  // namespace

void FreeHostMemory::operator()(void* data) const { std::free(data); }

absl::StatusOr<HostMemory> AllocateHostMemory(int64_t bytes) {
  const bool huge = bytes >= 2 * kHugePageBytes;
  const int64_t alignment = huge ? kHugePageBytes : kAlignmentBytes;
  void* data = nullptr;
  if (bytes < 0 || posix_memalign(&data, alignment, std::max(bytes, kAlignmentBytes)) != 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("cannot allocate ", bytes, " bytes on the host"));
  }
  // A hint: without it everything works, with more TLB misses.
  if (huge) static_cast<void>(madvise(data, bytes, MADV_HUGEPAGE));
  return HostMemory(static_cast<char*>(data));
}

absl::StatusOr<char*> Scratch::Get(int64_t bytes) {
  if (bytes > bytes_ || memory_ == nullptr) {
    memory_.reset();
    bytes_ = 0;
    HEADSTART_ASSIGN_OR_RETURN(memory_, AllocateHostMemory(bytes));
    bytes_ = bytes;
  }
  return memory_.get();
}

}  // namespace headstart

#include "tests/bench/gpu/kernel_trace.h"

#include <cuda_runtime.h>
#include <cupti.h>

#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

struct Activity {
  std::string name;
  uint32_t stream;
  uint64_t start_ns, end_ns, bytes;
};

// CUPTI calls back from a thread of its own.
std::mutex mutex;
std::vector<Activity>& Activities() {
  static auto* activities = new std::vector<Activity>();
  return *activities;
}

absl::Status ToStatus(CUptiResult result, absl::string_view what) {
  if (result == CUPTI_SUCCESS) return absl::OkStatus();
  const char* text = nullptr;
  cuptiGetResultString(result, &text);
  return absl::InternalError(absl::StrCat("CUPTI, ", what, ": ", text == nullptr ? "?" : text));
}

const char* CopyName(uint8_t kind) {
  switch (kind) {
    case CUPTI_ACTIVITY_MEMCPY_KIND_HTOD:
      return "copy HtoD";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOH:
      return "copy DtoH";
    case CUPTI_ACTIVITY_MEMCPY_KIND_DTOD:
      return "copy DtoD";
    default:
      return "copy";
  }
}

void Keep(const CUpti_Activity* record) {
  if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
    const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel10*>(record);
    Activities().push_back({kernel->name, kernel->streamId, kernel->start, kernel->end, 0});
  } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
    const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy6*>(record);
    Activities().push_back(
        {CopyName(copy->copyKind), copy->streamId, copy->start, copy->end, copy->bytes});
  } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMSET) {
    const auto* set = reinterpret_cast<const CUpti_ActivityMemset4*>(record);
    Activities().push_back({"memset", set->streamId, set->start, set->end, set->bytes});
  }
}

void CUPTIAPI GiveBuffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *size = size_t{8} << 20;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(ACTIVITY_RECORD_ALIGNMENT, *size));
  *max_records = 0;
}

void CUPTIAPI TakeBuffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid_bytes) {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    CUpti_Activity* record = nullptr;
    while (cuptiActivityGetNextRecord(buffer, valid_bytes, &record) == CUPTI_SUCCESS) Keep(record);
  }
  std::free(buffer);
}

constexpr CUpti_ActivityKind kKinds[] = {CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
                                         CUPTI_ACTIVITY_KIND_MEMCPY, CUPTI_ACTIVITY_KIND_MEMSET};

}  // namespace

absl::Status StartKernelTrace() {
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cuptiActivityRegisterCallbacks(GiveBuffer, TakeBuffer), "callbacks"));
  for (const CUpti_ActivityKind kind : kKinds) {
    HEADSTART_RETURN_IF_ERROR(ToStatus(cuptiActivityEnable(kind), "start"));
  }
  return absl::OkStatus();
}

absl::Status WriteKernelTrace(const std::string& path) {
  cudaDeviceSynchronize();
  for (const CUpti_ActivityKind kind : kKinds) {
    HEADSTART_RETURN_IF_ERROR(ToStatus(cuptiActivityDisable(kind), "end"));
  }
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "flush"));
  std::FILE* file = std::fopen(path.c_str(), "w");
  if (file == nullptr) return absl::InvalidArgumentError(absl::StrCat(path, " can't be written"));
  const std::lock_guard<std::mutex> lock(mutex);
  for (const Activity& activity : Activities()) {
    std::fprintf(file,
                 "{\"name\": \"%s\", \"stream\": %u, \"start_ns\": %" PRIu64
                 ", \"end_ns\": %" PRIu64 ", \"bytes\": %" PRIu64 "}\n",
                 activity.name.c_str(), activity.stream, activity.start_ns, activity.end_ns,
                 activity.bytes);
  }
  Activities().clear();
  return std::fclose(file) == 0 ? absl::OkStatus()
                                : absl::DataLossError(absl::StrCat(path, " could not be written"));
}

}  // namespace headstart

#include "kernels/cuda/copy_stream.h"

#include <utility>

#include "kernels/base/status_macros.h"

namespace headstart::cuda {
namespace {

class StreamCopy : public PendingCopy {
 public:
  StreamCopy(std::shared_ptr<EventPool> events, Event arrived)
      : events_(std::move(events)), arrived_(std::move(arrived)) {}
  ~StreamCopy() override { events_->GiveBack(std::move(arrived_)); }

  bool Ready() override { return cudaEventQuery(arrived_.get()) == cudaSuccess; }
  absl::Status Wait() override { return WaitFor(arrived_, "waiting for a copy to the host"); }

 private:
  const std::shared_ptr<EventPool> events_;
  Event arrived_;
};

bool Follows(const HostCopy& first, const HostCopy& second) {
  return static_cast<const char*>(first.from) + first.bytes == second.from &&
         static_cast<const char*>(first.to) + first.bytes == second.to;
}

}  // namespace

absl::StatusOr<Event> EventPool::Take() {
  {
    MutexLock lock(&mutex_);
    if (!events_.empty()) {
      Event event = std::move(events_.back());
      events_.pop_back();
      return event;
    }
  }
  return MakeEvent(kSleepEvent);
}

void EventPool::GiveBack(Event event) {
  MutexLock lock(&mutex_);
  events_.push_back(std::move(event));
}

absl::StatusOr<CopyStream> CopyStream::Create() {
  CopyStream copies;
  HEADSTART_ASSIGN_OR_RETURN(copies.stream_, MakeStream(/*urgent=*/true));
  HEADSTART_ASSIGN_OR_RETURN(copies.ready_, MakeEvent(kOrderEvent));
  return copies;
}

absl::StatusOr<std::unique_ptr<PendingCopy>> CopyStream::Start(absl::Span<const HostCopy> copies,
                                                               cudaStream_t stream) {
  const cudaStream_t own = stream_.get();
  HEADSTART_RETURN_IF_ERROR(
      ToStatus(cudaEventRecord(ready_.get(), stream), "marking what is to be copied"));
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaStreamWaitEvent(own, ready_.get(), cudaEventWaitDefault),
                                     "waiting for what is to be copied"));
  for (size_t i = 0; i < copies.size();) {
    HostCopy whole = copies[i++];
    while (i < copies.size() && Follows(whole, copies[i])) whole.bytes += copies[i++].bytes;
    HEADSTART_RETURN_IF_ERROR(
        ToStatus(cudaMemcpyAsync(whole.to, whole.from, static_cast<size_t>(whole.bytes),
                                 cudaMemcpyDeviceToHost, own),
                 "copying to the host"));
  }
  HEADSTART_ASSIGN_OR_RETURN(Event arrived, events_->Take());
  HEADSTART_RETURN_IF_ERROR(ToStatus(cudaEventRecord(arrived.get(), own), "copying to the host"));
  return std::make_unique<StreamCopy>(events_, std::move(arrived));
}

}  // namespace headstart::cuda

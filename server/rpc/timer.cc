#include "server/rpc/timer.h"

#include "kernels/base/instant.h"

namespace headstart {

Timer::Timer() : thread_([this] { Loop(); }) {}

Timer::~Timer() {
  {
    MutexLock lock(&mutex_);
    stopped_ = true;
    changed_.Signal();
  }
  thread_.join();
}

Timer::Id Timer::Schedule(Instant when, std::function<void()> fn) {
  MutexLock lock(&mutex_);
  const Id id = ++last_id_;
  entries_.emplace(std::make_pair(when, id), std::move(fn));
  times_.emplace(id, when);
  if (entries_.begin()->first.second == id) changed_.Signal();
  return id;
}

void Timer::Cancel(Id id) {
  std::function<void()> dropped;  // destroyed without the lock: it may own what calls back
  MutexLock lock(&mutex_);
  if (auto time = times_.find(id); time != times_.end()) {
    auto entry = entries_.find({time->second, id});
    dropped = std::move(entry->second);
    entries_.erase(entry);
    times_.erase(time);
    return;
  }
  if (std::this_thread::get_id() == thread_.get_id()) return;
  while (id != kNone && running_ == id) finished_.Wait(&mutex_);
}

void Timer::Loop() {
  MutexLock lock(&mutex_);
  while (!stopped_) {
    const Instant next = RunDue();
    if (!stopped_ && next > Instant::Now()) changed_.WaitUntil(&mutex_, next);
  }
}

Instant Timer::RunDue() {
  while (!stopped_ && !entries_.empty() && entries_.begin()->first.first <= Instant::Now()) {
    auto node = entries_.extract(entries_.begin());
    running_ = node.key().second;
    times_.erase(running_);
    mutex_.Unlock();
    node.mapped()();
    node.mapped() = nullptr;  // before anyone is told that it is over
    mutex_.Lock();
    running_ = kNone;
    finished_.SignalAll();
  }
  return entries_.empty() ? Instant::InfiniteFuture() : entries_.begin()->first.first;
}

}  // namespace headstart

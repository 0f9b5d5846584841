#include "tests/bench/grpc_loop.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "client/checksum.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/security/credentials.h"

namespace headstart {
namespace {

constexpr char kMethod[] = "/bench/Fetch";
constexpr auto kConnectTimeout = std::chrono::seconds(20);

absl::string_view AsText(absl::Span<const std::byte> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

// Copies the first bytes of a message. False when it is shorter.
template <typename T>
bool ReadFront(const std::vector<grpc::Slice>& slices, T* value) {
  auto* to = reinterpret_cast<char*>(value);
  size_t wanted = sizeof(T);
  for (const grpc::Slice& slice : slices) {
    const size_t count = std::min(wanted, slice.size());
    std::memcpy(to, slice.begin(), count);
    to += count;
    wanted -= count;
  }
  return wanted == 0;
}

template <typename T>
grpc::Slice CopyToSlice(const T& value) {
  return grpc::Slice(&value, sizeof(value));
}

}  // namespace

// ---- the server

// One call: reads its request, then has one message in flight until all are sent.
class PayloadStream final : public grpc::ServerGenericBidiReactor {
 public:
  explicit PayloadStream(LoopService* service) : service_(*service) { StartRead(&message_); }

  void OnReadDone(bool ok) override {
    std::vector<grpc::Slice> slices;
    if (!ok || !message_.Dump(&slices).ok() || !ReadFront(slices, &request_) || !IsValid()) {
      Finish(grpc::Status(
          grpc::StatusCode::INVALID_ARGUMENT,
          absl::StrCat("not a StreamRequest for a part of ", service_.source_.size(), " bytes")));
      return;
    }
    SendNext();
  }

  void OnWriteDone(bool ok) override {
    if (!ok) {
      Finish(grpc::Status::CANCELLED);
      return;
    }
    SendNext();
  }

  void OnDone() override { delete this; }

 private:
  bool IsValid() const {
    const auto size = static_cast<int64_t>(service_.source_.size());
    return request_.payload_bytes > 0 && request_.offset >= 0 && request_.bytes >= 0 &&
           request_.bytes <= size && request_.offset <= size - request_.bytes;
  }

  void SendNext() {
    const int64_t count = std::min(request_.payload_bytes, request_.bytes);
    if (count == 0) {
      Finish(grpc::Status::OK);
      return;
    }
    const auto payload = service_.source_.subspan(request_.offset, count);
    MessageHeader header{.offset = request_.offset, .bytes = count};
    if (request_.checksum) header.crc32c = ExtendCrc32c(0, AsText(payload));
    const grpc::Slice slices[] = {CopyToSlice(header), service_.Lend(payload)};
    message_ = grpc::ByteBuffer(slices, 2);
    request_.offset += count;
    request_.bytes -= count;
    StartWrite(&message_);
  }

  LoopService& service_;
  StreamRequest request_;
  grpc::ByteBuffer message_;
};

grpc::ServerGenericBidiReactor* LoopService::CreateReactor(grpc::GenericCallbackServerContext*) {
  return new PayloadStream(this);
}

grpc::Slice LoopService::Lend(absl::Span<std::byte> payload) {
  struct Loan {
    LoopService* service;
    int64_t bytes;
  };
  const auto bytes = static_cast<int64_t>(payload.size());
  const int64_t held = in_flight_ += bytes;
  int64_t peak = peak_;
  while (held > peak && !peak_.compare_exchange_weak(peak, held)) {
  }
  const auto give_back = [](void* loan_pointer) {
    const std::unique_ptr<Loan> loan(static_cast<Loan*>(loan_pointer));
    loan->service->in_flight_ -= loan->bytes;
  };
  return grpc::Slice(payload.data(), payload.size(), give_back, new Loan{this, bytes});
}

// ---- the client

namespace {

// Puts payloads into the destination. Thread-safe.
class Placer {
 public:
  Placer(Arrival arrival, absl::Span<std::byte> destination)
      : arrival_(arrival), destination_(destination) {}

  void Place(grpc::ByteBuffer* message) {
    std::vector<grpc::Slice> slices;
    MessageHeader header;
    const auto size = static_cast<int64_t>(destination_.size());
    if (!message->Dump(&slices).ok() || !ReadFront(slices, &header) || header.bytes < 0 ||
        header.bytes != static_cast<int64_t>(message->Length() - sizeof(header)) ||
        header.offset < 0 || header.bytes > size || header.offset > size - header.bytes) {
      Fail("a message is not header and payload");
      return;
    }
    if (arrival_ != Arrival::kDrop) Copy(slices, header);
    bytes_ += header.bytes;
  }

  void Fail(absl::string_view what) {
    absl::MutexLock lock(&mutex_);
    status_.Update(absl::DataLossError(what));
  }

  // The first failure, or that bytes are missing.
  absl::Status Finish() {
    const auto size = static_cast<int64_t>(destination_.size());
    if (bytes_ != size) Fail(absl::StrCat(bytes_.load(), " bytes arrived of ", size));
    absl::MutexLock lock(&mutex_);
    return status_;
  }

 private:
  void Copy(const std::vector<grpc::Slice>& slices, const MessageHeader& header) {
    std::byte* to = destination_.data() + header.offset;
    uint32_t crc = 0;
    size_t skip = sizeof(header);
    for (const grpc::Slice& slice : slices) {
      const size_t begin = std::min(skip, slice.size());
      skip -= begin;
      const size_t count = slice.size() - begin;
      std::memcpy(to, slice.begin() + begin, count);
      if (arrival_ == Arrival::kCopyAndCheck) crc = ExtendCrc32c(crc, AsText({to, count}));
      to += count;
    }
    if (arrival_ == Arrival::kCopyAndCheck && crc != header.crc32c)
      Fail(absl::StrCat("wrong CRC-32C of the payload at ", header.offset));
  }

  const Arrival arrival_;
  const absl::Span<std::byte> destination_;
  std::atomic<int64_t> bytes_{0};
  absl::Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
};

grpc::ByteBuffer ToMessage(const StreamRequest& request) {
  const grpc::Slice slice = CopyToSlice(request);
  return grpc::ByteBuffer(&slice, 1);
}

// One stream on gRPC's threads. The next read is under way while a message is placed.
class CallbackStream final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer> {
 public:
  CallbackStream(grpc::GenericStub* stub, const StreamRequest& request, Placer* placer,
                 absl::BlockingCounter* running)
      : request_(ToMessage(request)), placer_(*placer), running_(*running) {
    stub->PrepareBidiStreamingCall(&context_, kMethod, grpc::StubOptions(), this);
    StartWriteLast(&request_, grpc::WriteOptions());
    StartRead(&arriving_);
    StartCall();
  }

  void OnReadDone(bool ok) override {
    if (!ok) return;
    grpc::ByteBuffer message;
    message.Swap(&arriving_);
    StartRead(&arriving_);
    placer_.Place(&message);  // OnDone waits until this reaction has returned
  }

  void OnDone(const grpc::Status& status) override {
    if (!status.ok()) placer_.Fail(status.error_message());
    running_.DecrementCount();
  }

 private:
  grpc::ClientContext context_;
  grpc::ByteBuffer request_;
  grpc::ByteBuffer arriving_;
  Placer& placer_;
  absl::BlockingCounter& running_;
};

// One stream on the calling thread; returns when it has ended.
void FetchOnQueue(grpc::GenericStub* stub, const StreamRequest& request, Placer* placer) {
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const auto wait = [&queue] {
    void* tag;
    bool ok = false;
    return queue.Next(&tag, &ok) && ok;
  };
  const auto call = stub->PrepareCall(&context, kMethod, &queue);
  call->StartCall(nullptr);
  bool open = wait();
  if (open) {
    call->WriteLast(ToMessage(request), grpc::WriteOptions(), nullptr);
    open = wait();
  }
  grpc::ByteBuffer arriving;
  if (open) call->Read(&arriving, nullptr);
  while (open && wait()) {
    grpc::ByteBuffer message;
    message.Swap(&arriving);
    call->Read(&arriving, nullptr);
    placer->Place(&message);
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  wait();
  if (!status.ok()) placer->Fail(status.error_message());
}

using Channels = std::vector<std::shared_ptr<grpc::Channel>>;

absl::StatusOr<Channels> Connect(const std::string& target, int connections,
                                 grpc::ChannelArguments arguments) {
  arguments.SetMaxReceiveMessageSize(-1);
  // Channels with equal arguments share one connection otherwise.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  Channels channels;
  for (int i = 0; i < connections; ++i) {
    channels.push_back(
        grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments));
    if (!channels.back()->WaitForConnected(std::chrono::system_clock::now() + kConnectTimeout))
      return absl::UnavailableError(absl::StrCat("no server at ", target));
  }
  return channels;
}

// The i-th of n about equal shares, cut between payloads.
StreamRequest Share(int i, int n, int64_t bytes, const LoopOptions& options) {
  const int64_t payloads = (bytes + options.payload_bytes - 1) / options.payload_bytes;
  const auto border = [&](int64_t at) {
    return std::min(bytes, payloads * at / n * options.payload_bytes);
  };
  return {.offset = border(i),
          .bytes = border(i + 1) - border(i),
          .payload_bytes = options.payload_bytes,
          .checksum = options.arrival == Arrival::kCopyAndCheck};
}

void RunStreams(std::vector<grpc::GenericStub>& stubs, const std::vector<StreamRequest>& shares,
                Waiting waiting, Placer* placer) {
  if (waiting == Waiting::kCallback) {
    absl::BlockingCounter running(static_cast<int>(shares.size()));
    std::vector<std::unique_ptr<CallbackStream>> streams;
    for (size_t i = 0; i < shares.size(); ++i) {
      streams.push_back(
          std::make_unique<CallbackStream>(&stubs[i % stubs.size()], shares[i], placer, &running));
    }
    running.Wait();
    return;
  }
  std::vector<std::thread> threads;
  for (size_t i = 0; i < shares.size(); ++i)
    threads.emplace_back(FetchOnQueue, &stubs[i % stubs.size()], shares[i], placer);
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

absl::StatusOr<double> FetchAll(const std::string& target, const LoopOptions& options,
                                const grpc::ChannelArguments& arguments,
                                absl::Span<std::byte> destination) {
  const absl::StatusOr<Channels> channels = Connect(target, options.connections, arguments);
  if (!channels.ok()) return channels.status();
  std::vector<grpc::GenericStub> stubs(channels->begin(), channels->end());
  const int n = options.connections * options.streams;
  std::vector<StreamRequest> shares;
  for (int i = 0; i < n; ++i)
    shares.push_back(Share(i, n, static_cast<int64_t>(destination.size()), options));
  Placer placer(options.arrival, destination);

  const auto start = std::chrono::steady_clock::now();
  RunStreams(stubs, shares, options.waiting, &placer);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  if (const absl::Status status = placer.Finish(); !status.ok()) return status;
  return elapsed.count();
}

}  // namespace headstart

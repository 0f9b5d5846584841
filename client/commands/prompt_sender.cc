#include "client/commands/prompt_sender.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/memory/memory.h"
#include "absl/strings/str_cat.h"
#include "client/commands/request_report.h"
#include "client/grpc_status.h"
#include "client/manifest_check.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

// Clients that a load has at most: each has up to nine connections, of which the server takes 256
// of a peer, and calls of kMostPromptsAtATime / 16 prompts on each, of which it takes 128.
constexpr int kMostClients = 16;

// Receives the KV of one prompt into memory that goes back in the end.
class Destination {
 public:
  Destination(KvMemory& memory, bool into_memory) : memory_(memory), into_memory_(into_memory) {}
  ~Destination() {
    if (buffer_.bytes > 0) memory_.GiveBack(std::move(buffer_));
  }
  Destination(const Destination&) = delete;
  Destination& operator=(const Destination&) = delete;

  KvReceiverOptions Receive() {
    KvReceiverOptions receive;
    if (into_memory_) {
      receive.on_manifest = [this](const v1::KvManifest&, const KvShape& shape) {
        return Place(shape);
      };
    }
    return receive;
  }

 private:
  absl::StatusOr<KvDestination> Place(const KvShape& shape) {
    // As a decode kernel without fp8 wants it.
    const KvValues values = shape.has_scales() ? KvValues::kBF16 : KvValues::kAsSent;
    const KvShape placed = ShapeOfValues(shape, values);
    HEADSTART_ASSIGN_OR_RETURN(buffer_, memory_.Take(placed));
    return ContiguousKv(shape, buffer_.span().first(static_cast<size_t>(placed.total_bytes())),
                        values);
  }

  KvMemory& memory_;
  const bool into_memory_;
  KvBuffer buffer_;
};

void NoteAccepted(const v1::Accepted& accepted, LoadSample* sample) {
  sample->accepted = Instant::Now();
  if (!accepted.has_predicted_ttft()) return;
  sample->predicted_ttft = absl::Seconds(accepted.predicted_ttft().seconds()) +
                           absl::Nanoseconds(accepted.predicted_ttft().nanos());
}

void NoteCompleted(const v1::PrefillRequest& request, const v1::Completed& completed,
                   LoadSample* sample) {
  sample->cached_tokens = completed.manifest().cached_tokens();
  // Servers may leave out more than was asked for.
  sample->skipped_tokens = std::max(request.skip_tokens(), completed.manifest().skip_tokens());
  sample->density = Density(completed);
}

void NoteError(const absl::Status& status, LoadSample* sample) {
  const std::string reason = ErrorReasonOf(status);
  sample->error =
      absl::StrCat(absl::StatusCodeToString(status.code()), reason.empty() ? "" : " ", reason);
  sample->message = DescribeStatus(status);
  sample->refused = !reason.empty() && !sample->was_accepted();
}

}  // namespace

absl::Status KvMemory::Reserve(int count, const KvShape& shape) {
  std::vector<KvBuffer> taken;
  for (int i = 0; i < count; ++i) {
    HEADSTART_ASSIGN_OR_RETURN(KvBuffer buffer, Take(shape));
    std::memset(buffer.data.get(), 0, static_cast<size_t>(buffer.bytes));
    taken.push_back(std::move(buffer));
  }
  for (KvBuffer& buffer : taken) GiveBack(std::move(buffer));
  return absl::OkStatus();
}

absl::StatusOr<KvBuffer> KvMemory::Take(const KvShape& shape) {
  {
    absl::MutexLock lock(&mutex_);
    auto best = free_.end();
    for (auto it = free_.begin(); it != free_.end(); ++it) {
      const bool fits = it->bytes >= shape.total_bytes();
      if (fits && (best == free_.end() || it->bytes < best->bytes)) best = it;
    }
    if (best != free_.end()) {
      KvBuffer buffer = std::move(*best);
      free_.erase(best);
      return buffer;
    }
  }
  return AllocateKv(shape);
}

void KvMemory::GiveBack(KvBuffer buffer) {
  absl::MutexLock lock(&mutex_);
  free_.push_back(std::move(buffer));
}

absl::StatusOr<std::unique_ptr<PromptSender>> PromptSender::Create(SenderOptions options,
                                                                   int most_at_a_time) {
  options.client.retry.max_attempts = 1;  // a refusal is a result
  auto sender = absl::WrapUnique(new PromptSender(std::move(options)));
  const int count = std::min(most_at_a_time, kMostClients);
  for (int i = 0; i < count; ++i) {
    HEADSTART_ASSIGN_OR_RETURN(auto client, PrefillClient::Create(sender->options_.client));
    sender->clients_.push_back(std::move(client));
  }
  HEADSTART_ASSIGN_OR_RETURN(sender->model_, sender->clients_[0]->GetModelInfo());
  HEADSTART_ASSIGN_OR_RETURN(sender->server_, sender->clients_[0]->GetServerInfo());
  if (sender->model_.vocab_size() == 0)
    return absl::DataLossError("the server's model has no vocabulary");
  return sender;
}

absl::Status PromptSender::Reserve(int count, int64_t num_tokens) {
  const v1::KvLayout& layout = model_.kv_layout();
  const KvShape shape{.num_layers = layout.num_layers(),
                      .num_kv_heads = layout.num_kv_heads(),
                      .head_dim = layout.head_dim(),
                      .num_tokens = num_tokens,
                      .element_bytes = KvDtypeBytes(layout.dtype())};
  return options_.into_memory ? memory_.Reserve(count, shape) : absl::OkStatus();
}

void PromptSender::Send(const v1::PrefillRequest& request, int worker, LoadSample* sample) {
  sample->prompt_tokens = request.token_ids_size();
  sample->priority = request.priority();
  const PrefillClient& client = *clients_[worker % clients_.size()];
  const absl::Status status = options_.fetch_alone ? FetchAlone(request, client, sample)
                                                   : PrefillAndTake(request, client, sample);
  if (!status.ok()) NoteError(status, sample);
}

absl::Status PromptSender::PrefillAndTake(const v1::PrefillRequest& request,
                                          const PrefillClient& client, LoadSample* sample) {
  Destination destination(memory_, options_.into_memory);
  KvReceiverOptions receive = destination.Receive();
  if (options_.deadline > absl::ZeroDuration()) {
    receive.timeout =
        std::max(sample->planned + options_.deadline - Instant::Now(), absl::Milliseconds(1));
  }
  receive.on_accepted = [sample](const v1::Accepted& accepted) {
    NoteAccepted(accepted, sample);
    return absl::OkStatus();
  };
  HEADSTART_ASSIGN_OR_RETURN(const PrefillOutcome outcome,
                             client.Prefill(request, std::move(receive)));
  const Instant start = sample->accepted - outcome.timing.accepted;  // of the attempt
  sample->began = start + outcome.timing.manifest;
  sample->first_token = start + outcome.timing.first_token;
  sample->all_kv = start + std::max(outcome.timing.completed, outcome.timing.last_chunk);
  sample->kv_bytes = static_cast<int64_t>(outcome.completed.kv_bytes());
  sample->exposed_transfer = ExposedTransfer(outcome.completed);
  sample->connections = outcome.connections;
  NoteCompleted(request, outcome.completed, sample);
  return absl::OkStatus();
}

absl::Status PromptSender::FetchAlone(v1::PrefillRequest request, const PrefillClient& client,
                                      LoadSample* sample) {
  request.mutable_detached();
  KvLocation location;
  KvReceiverOptions prefill;
  prefill.on_accepted = [&location](const v1::Accepted& accepted) {
    location = {accepted.fetch_id(), accepted.fetch_address()};
    return absl::OkStatus();
  };
  HEADSTART_ASSIGN_OR_RETURN(const PrefillOutcome outcome, client.Prefill(request, prefill));
  sample->connections = std::max(options_.client.connections, 1);
  NoteCompleted(request, outcome.completed, sample);
  Destination destination(memory_, options_.into_memory);
  KvReceiverOptions receive = destination.Receive();
  receive.expected.skip_tokens = request.skip_tokens();
  sample->planned = sample->sent = sample->accepted = sample->began = Instant::Now();
  const absl::StatusOr<FetchOutcome> fetched =
      client.Fetch(location, {}, sample->connections, std::move(receive));
  sample->first_token = sample->all_kv = Instant::Now();
  HEADSTART_RETURN_IF_ERROR(client.ReleaseKv(location));
  HEADSTART_RETURN_IF_ERROR(fetched.status());
  sample->kv_bytes = static_cast<int64_t>(fetched->completed.kv_bytes());
  return absl::OkStatus();
}

}  // namespace headstart

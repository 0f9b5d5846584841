#include "client/c_api/receiver.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/time.h"
#include "client/cancel_token.h"
#include "client/grpc_status.h"
#include "client/prefill_client.h"

struct HeadstartClient {
  std::unique_ptr<headstart::PrefillClient> client;
};

struct HeadstartCancel {
  headstart::CancelToken token;
};

namespace headstart {
namespace {

// A reply with the memory that its fields point to.
struct OwnedReply : HeadstartReply {
  std::string status_bytes;
  std::string accepted_bytes;
  std::string completed_bytes;

  HeadstartReply* Release() {
    const auto view = [](const std::string& bytes) {
      return HeadstartBytes{reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()};
    };
    status = view(status_bytes);
    accepted = view(accepted_bytes);
    completed = view(completed_bytes);
    return this;
  }
};

std::string Text(const char* text) { return text != nullptr ? text : ""; }

std::string Text(HeadstartBytes bytes) {
  return {reinterpret_cast<const char*>(bytes.data), bytes.size};
}

HeadstartReply* Reply(const absl::Status& status) {
  auto* reply = new OwnedReply{};
  if (!status.ok()) reply->status_bytes = ToRpcStatus(status).SerializeAsString();
  return reply->Release();
}

HeadstartReply* Reply(const PrefillOutcome& outcome) {
  auto* reply = new OwnedReply{};
  reply->accepted_bytes = outcome.accepted.SerializeAsString();
  reply->completed_bytes = outcome.completed.SerializeAsString();
  reply->accepted_s = absl::ToDoubleSeconds(outcome.timing.accepted);
  reply->manifest_s = absl::ToDoubleSeconds(outcome.timing.manifest);
  reply->first_chunk_s = absl::ToDoubleSeconds(outcome.timing.first_chunk);
  reply->last_chunk_s = absl::ToDoubleSeconds(outcome.timing.last_chunk);
  reply->completed_s = absl::ToDoubleSeconds(outcome.timing.completed);
  reply->attempts = outcome.attempts;
  reply->connections = outcome.connections;
  reply->resumes = outcome.resumes;
  return reply->Release();
}

HeadstartReply* Reply(const FetchOutcome& outcome) {
  auto* reply = new OwnedReply{};
  reply->completed_bytes = outcome.completed.SerializeAsString();
  reply->resumes = outcome.resumes;
  return reply->Release();
}

template <typename T>
HeadstartReply* Reply(const absl::StatusOr<T>& outcome) {
  return outcome.ok() ? Reply(*outcome) : Reply(outcome.status());
}

absl::Status StatusOfCallback(int32_t result, absl::string_view name) {
  if (result == 0) return absl::OkStatus();
  return absl::AbortedError(absl::StrCat(name, " returned ", result));
}

absl::StatusOr<KvDestination> ToDestination(const HeadstartKvDestination& from) {
  if (from.values < 0 || from.values > static_cast<int32_t>(KvValues::kF32)) {
    return absl::InvalidArgumentError(absl::StrCat("values=", from.values, " is not 0, 1 or 2"));
  }
  KvDestination to{
      .layers = {},
      .plane_bytes = from.plane_bytes,
      .page_tokens = from.page_tokens,
      .page_table = {from.page_table, from.page_table + from.num_pages},
      .strides = {.page = from.page_stride, .head = from.head_stride, .token = from.token_stride},
      .token_begin = from.token_begin,
      .values = static_cast<KvValues>(from.values),
      .scales = {from.scales, static_cast<size_t>(from.num_scales)},
      .arrived = {from.arrived, static_cast<size_t>(from.num_arrived)}};
  for (int64_t i = 0; i + 1 < from.num_planes; i += 2) {
    to.layers.push_back({.k = static_cast<std::byte*>(from.planes[i]),
                         .v = static_cast<std::byte*>(from.planes[i + 1])});
  }
  return to;
}

absl::StatusOr<KvDestination> AskForMemory(const HeadstartCallbacks& callbacks,
                                           const v1::KvManifest& manifest, const KvShape& shape) {
  const std::string bytes = manifest.SerializeAsString();
  const HeadstartKvShape c_shape{.num_layers = shape.num_layers,
                                 .num_kv_heads = shape.num_kv_heads,
                                 .num_tokens = shape.num_tokens,
                                 .head_dim = shape.head_dim,
                                 .element_bytes = shape.element_bytes,
                                 .token_begin = shape.token_begin,
                                 .block_tokens = shape.block_tokens};
  HeadstartKvDestination destination{};
  const absl::Status status = StatusOfCallback(
      callbacks.on_manifest(callbacks.context,
                            {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()},
                            &c_shape, &destination),
      "on_manifest");
  if (!status.ok()) return status;
  return ToDestination(destination);
}

// The callbacks outlive the call.
KvReceiverOptions ReceiverOptions(const HeadstartCallbacks& callbacks, double timeout_s) {
  KvReceiverOptions options;
  options.timeout = absl::Seconds(timeout_s);
  // Whoever gives the memory knows how much is too much.
  options.max_kv_bytes = std::numeric_limits<int64_t>::max();
  options.on_manifest = [&callbacks](const v1::KvManifest& manifest, const KvShape& shape) {
    return AskForMemory(callbacks, manifest, shape);
  };
  if (callbacks.on_accepted != nullptr) {
    options.on_accepted = [&callbacks](const v1::Accepted& accepted) {
      const std::string bytes = accepted.SerializeAsString();
      return StatusOfCallback(
          callbacks.on_accepted(callbacks.context,
                                {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}),
          "on_accepted");
    };
  }
  if (callbacks.on_layer != nullptr) {
    options.on_layer = [&callbacks](int64_t layer) {
      return StatusOfCallback(callbacks.on_layer(callbacks.context, layer), "on_layer");
    };
  }
  return options;
}

PrefillClientOptions ClientOptions(const HeadstartClientOptions& from) {
  PrefillClientOptions to;
  to.target = Text(from.target);
  to.tls = {.enabled = from.tls != 0,
            .ca_file = Text(from.ca_file),
            .cert_file = Text(from.cert_file),
            .key_file = Text(from.key_file),
            .server_name = Text(from.server_name)};
  to.retry.max_attempts = from.max_attempts;
  to.connections = from.connections;
  to.allowed_fetch_hosts = absl::StrSplit(Text(from.allowed_fetch_hosts), ',', absl::SkipEmpty());
  return to;
}

CancelToken* TokenOf(HeadstartCancel* cancel) {
  return cancel != nullptr ? &cancel->token : nullptr;
}

}  // namespace
}  // namespace headstart

int32_t headstart_abi_version() { return HEADSTART_ABI_VERSION; }

void headstart_reply_free(HeadstartReply* reply) {
  delete static_cast<headstart::OwnedReply*>(reply);
}

HeadstartReply* headstart_client_new(const HeadstartClientOptions* options,
                                     HeadstartClient** client) {
  auto created = headstart::PrefillClient::Create(headstart::ClientOptions(*options));
  const absl::Status status = created.status();
  if (created.ok()) *client = new HeadstartClient{*std::move(created)};
  return headstart::Reply(status);
}

void headstart_client_free(HeadstartClient* client) { delete client; }

HeadstartCancel* headstart_cancel_new() { return new HeadstartCancel; }
void headstart_cancel(HeadstartCancel* cancel) { cancel->token.Cancel(); }
void headstart_cancel_free(HeadstartCancel* cancel) { delete cancel; }

HeadstartReply* headstart_prefill(HeadstartClient* client, HeadstartBytes request, double timeout_s,
                                  const HeadstartCallbacks* callbacks, HeadstartCancel* cancel) {
  headstart::v1::PrefillRequest message;
  if (!message.ParseFromArray(request.data, static_cast<int>(request.size)))
    return headstart::Reply(absl::InvalidArgumentError("request is no PrefillRequest"));
  return headstart::Reply(client->client->Prefill(
      message, headstart::ReceiverOptions(*callbacks, timeout_s), headstart::TokenOf(cancel)));
}

HeadstartReply* headstart_fetch(HeadstartClient* client, const HeadstartFetch* fetch,
                                double timeout_s, const HeadstartCallbacks* callbacks,
                                HeadstartCancel* cancel) {
  headstart::v1::KvPart part;
  if (!part.ParseFromArray(fetch->part.data, static_cast<int>(fetch->part.size)))
    return headstart::Reply(absl::InvalidArgumentError("part is no KvPart"));
  headstart::KvReceiverOptions receive = headstart::ReceiverOptions(*callbacks, timeout_s);
  receive.expected.skip_tokens = fetch->skip_tokens;
  receive.expected.held_pages = headstart::Text(fetch->held_pages);
  receive.expected.token_ids.resize(fetch->token_ids.size / sizeof(uint32_t));
  std::copy_n(fetch->token_ids.data, receive.expected.token_ids.size() * sizeof(uint32_t),
              reinterpret_cast<uint8_t*>(receive.expected.token_ids.data()));
  return headstart::Reply(client->client->Fetch(
      {.fetch_id = headstart::Text(fetch->fetch_id),
       .fetch_address = headstart::Text(fetch->fetch_address)},
      part, fetch->num_stripes, std::move(receive), headstart::TokenOf(cancel)));
}

#include "client/decode/decode_node.h"

#include <algorithm>
#include <atomic>
#include <future>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/model/model_config.h"
#include "kernels/base/instant.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

using Session = std::unique_ptr<DecodeSession>;

v1::KvDtype ToProto(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return v1::KV_DTYPE_BF16;
    case DType::kF16:
      return v1::KV_DTYPE_F16;
    case DType::kF32:
      return v1::KV_DTYPE_F32;
    default:
      return v1::KV_DTYPE_UNSPECIFIED;
  }
}

absl::Status CheckTokenIds(const v1::PrefillRequest& request, const ModelConfig& config) {
  for (int i = 0; i < request.token_ids_size(); ++i) {
    if (request.token_ids(i) >= static_cast<uint32_t>(config.vocab_size)) {
      return absl::InvalidArgumentError(absl::StrCat("token_ids[", i, "]=", request.token_ids(i),
                                                     " is not below vocab_size ",
                                                     config.vocab_size));
    }
  }
  return absl::OkStatus();
}

// What the model's config says about the KV to come.
void ExpectModel(const ModelConfig& config, KvExpectation* expected) {
  expected->num_layers = config.num_layers;
  expected->num_kv_heads = config.heads.num_kv_heads;
  expected->head_dim = config.heads.head_dim;
}

struct Loaded {
  absl::StatusOr<Session> session;
  double seconds = 0;
};

// Loads the model on a thread of its own. Who goes without Get does not want it any more: then it
// ends with the tensor that is being read.
class Loading {
 public:
  ~Loading() { given_up_.store(true); }

  // Once at least. A later call does nothing.
  void Start(const DecodeNodeOptions& options, const ModelConfig& config) {
    if (loaded_.valid()) return;
    const int64_t wanted = options.request.token_ids_size() + options.max_new_tokens;
    DecodeOptions decode{.model_dir = options.model_dir,
                         .links = options.links,
                         .backend = options.backend,
                         .max_tokens = std::min(wanted, config.max_positions)};
    loaded_ =
        std::async(std::launch::async, [this, decode = std::move(decode), tell = options.on_load] {
          const Instant start = Instant::Now();
          auto session =
              DecodeSession::Create(decode, [&](int64_t done_bytes, int64_t total_bytes) {
                if (given_up_.load())
                  return absl::CancelledError("the model is not needed any more");
                return tell ? tell(done_bytes, total_bytes) : absl::OkStatus();
              });
          return Loaded{std::move(session), absl::ToDoubleSeconds(Instant::Now() - start)};
        });
  }
  Loaded Get() { return loaded_.get(); }

 private:
  std::atomic<bool> given_up_{false};
  std::future<Loaded> loaded_;  // goes first, and waits for the thread
};

absl::Status CheckSameModel(const v1::KvManifest& manifest, const DecodeSession& session) {
  if (manifest.model_hash() != session.model_hash()) {
    return absl::FailedPreconditionError(absl::StrCat("the server's model has hash ",
                                                      manifest.model_hash(), ", this one ",
                                                      session.model_hash()));
  }
  const v1::KvDtype dtype = manifest.layout().dtype();
  if (dtype != v1::KV_DTYPE_FP8_E4M3 && dtype != ToProto(session.kv_dtype())) {
    return absl::FailedPreconditionError(
        absl::StrCat("the server's KV is ", v1::KvDtype_Name(manifest.layout().dtype()),
                     ", this node keeps ", DTypeName(session.kv_dtype())));
  }
  return absl::OkStatus();
}

// The KV as this node receives it: fp8 as f32, for whatever the session computes in.
struct ReceivedKv {
  KvShape shape;
  KvBuffer memory;

  absl::StatusOr<KvDestination> Place(const KvShape& sent) {
    const KvValues values = sent.has_scales() ? KvValues::kF32 : KvValues::kAsSent;
    shape = ShapeOfValues(sent, values);
    HEADSTART_ASSIGN_OR_RETURN(memory, AllocateKv(sent, values));
    return ContiguousKv(sent, memory.span(), values);
  }
};

std::vector<BFloat16> RoundToBF16(absl::Span<const std::byte> f32) {
  const auto* values = reinterpret_cast<const float*>(f32.data());
  return {values, values + f32.size() / sizeof(float)};
}

absl::Status Import(const ReceivedKv& kv, DecodeSession& session) {
  const KvShape& shape = kv.shape;
  HEADSTART_RETURN_IF_ERROR(session.StartSequence(shape.num_tokens));
  const int64_t plane = shape.plane_bytes();
  const bool narrows = shape.element_bytes > DTypeBytes(session.kv_dtype());
  for (int64_t l = 0; l < shape.num_layers; ++l) {
    absl::Span<const std::byte> layer = kv.memory.span().subspan(2 * l * plane, 2 * plane);
    std::vector<BFloat16> narrow;
    if (narrows) {
      narrow = RoundToBF16(layer);
      layer = {reinterpret_cast<const std::byte*>(narrow.data()), narrow.size() * sizeof(BFloat16)};
    }
    const size_t half = layer.size() / 2;
    HEADSTART_RETURN_IF_ERROR(
        session.ImportLayer(static_cast<int32_t>(l), layer.first(half), layer.subspan(half)));
  }
  return absl::OkStatus();
}

// Takes generated tokens until one is the last.
struct TokenOutput {
  const DecodeNodeOptions& options;
  const ModelConfig& config;
  const std::function<void(int32_t)>& on_token;
  DecodeNodeResult& result;

  // False when nothing is to follow; result.stop says why.
  bool Take(int32_t token) {
    const std::vector<int32_t>& eos = config.eos_token_ids;
    if (!options.ignore_eos && std::find(eos.begin(), eos.end(), token) != eos.end()) {
      result.stop = "eos";
      return false;
    }
    result.tokens.push_back(token);
    on_token(token);
    const auto generated = static_cast<int64_t>(result.tokens.size());
    if (generated >= options.max_new_tokens) {
      result.stop = "max_tokens";
    } else if (options.request.token_ids_size() + generated > config.max_positions) {
      result.stop = "context";
    }
    return result.stop.empty();
  }
};

absl::Status Generate(DecodeSession& session, int32_t token, TokenOutput& output) {
  do {
    HEADSTART_ASSIGN_OR_RETURN(const SampledToken next, session.Step(token));
    token = next.id;
  } while (output.Take(token));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<DecodeNodeResult> RunDecodeNode(const DecodeNodeOptions& options,
                                               const std::function<void(int32_t)>& on_token,
                                               KvReceiverOptions receive) {
  HEADSTART_ASSIGN_OR_RETURN(const ModelConfig config,
                             ReadModelConfig(options.model_dir, options.links));
  HEADSTART_RETURN_IF_ERROR(CheckTokenIds(options.request, config));
  HEADSTART_ASSIGN_OR_RETURN(const auto client, PrefillClient::Create(options.client));
  ExpectModel(config, &receive.expected);
  Loading loading;
  receive.on_accepted = [&, tell = receive.on_accepted](const v1::Accepted& accepted) {
    loading.Start(options, config);
    return tell ? tell(accepted) : absl::OkStatus();
  };
  ReceivedKv kv;
  receive.on_manifest = [&](const v1::KvManifest&, const KvShape& sent) { return kv.Place(sent); };
  DecodeNodeResult result;
  HEADSTART_ASSIGN_OR_RETURN(result.prefill, client->Prefill(options.request, std::move(receive)));

  const auto first_token = static_cast<int32_t>(result.prefill.completed.first_token().id());
  TokenOutput output{options, config, on_token, result};
  if (!output.Take(first_token)) return result;
  Loaded loaded = loading.Get();
  HEADSTART_RETURN_IF_ERROR(loaded.session.status());
  DecodeSession& session = **loaded.session;
  HEADSTART_RETURN_IF_ERROR(CheckSameModel(result.prefill.completed.manifest(), session));
  const Instant import_start = Instant::Now();
  HEADSTART_RETURN_IF_ERROR(Import(kv, session));
  kv = {};
  const Instant decode_start = Instant::Now();
  HEADSTART_RETURN_IF_ERROR(Generate(session, first_token, output));
  result.load_seconds = loaded.seconds;
  result.import_seconds = absl::ToDoubleSeconds(decode_start - import_start);
  result.decode_seconds = absl::ToDoubleSeconds(Instant::Now() - decode_start);
  return result;
}

}  // namespace headstart

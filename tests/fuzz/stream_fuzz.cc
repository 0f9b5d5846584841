// One message of the response streams of a prompt, from a server that is not trusted. Of the first
// byte the top bit says how the KV comes: on the stream of Prefill, or as two stripes, of which the
// second is damaged; the others say which message of a correct stream the other bytes take the
// place of. Whatever is accepted is complete and right.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "client/kv_receiver.h"
#include "kernels/base/check.h"
#include "tests/client/kv_stream.h"

namespace headstart {
namespace {

using testing::KvStream;

// The streams that ship the KV; the last one is damaged.
struct Streams {
  StreamKind kind;
  std::vector<KvStream> streams;
};

KvReceiverOptions ReceiveInto(std::vector<std::byte>* received) {
  KvReceiverOptions options;
  options.max_kv_bytes = 1 << 16;
  options.on_manifest = [received](const v1::KvManifest&, const KvShape& shape) {
    HEADSTART_CHECK(shape.total_bytes() <= 1 << 16);
    received->assign(shape.total_bytes(), std::byte{0});
    return ContiguousKv(shape, absl::MakeSpan(*received));
  };
  return options;
}

// False when the receiver found something wrong.
bool Receive(const KvStream& stream, KvReceiver& receiver, size_t slice_bytes, size_t replaced,
             const std::string& message) {
  for (size_t i = 0; i < stream.size(); ++i) {
    grpc::ByteBuffer bytes =
        testing::ToByteBuffer(i == replaced ? message : stream[i].SerializeAsString(), slice_bytes);
    if (!receiver.OnMessage(bytes).ok()) return false;
  }
  return receiver.OnEnd().ok();
}

void Run(const Streams& sent, const std::vector<std::byte>& kv, uint8_t choice,
         const std::string& message) {
  std::vector<std::byte> received;
  KvAssembly assembly(ReceiveInto(&received));
  const size_t replaced = choice % sent.streams.back().size();
  for (const KvStream& stream : sent.streams) {
    const bool damaged = &stream == &sent.streams.back();
    KvReceiver receiver(sent.kind, &assembly);
    if (!Receive(stream, receiver, 1 + choice, damaged ? replaced : stream.size(), message)) return;
  }
  if (!assembly.CheckWhole().ok()) return;
  HEADSTART_CHECK(assembly.kv_bytes() == assembly.shape().total_bytes());
  // Only a manifest can change what the bytes mean; the bytes themselves have checksums.
  const bool manifest_is_right = sent.kind == StreamKind::kFetch || replaced != 1;
  if (manifest_is_right) HEADSTART_CHECK(received == kv);
}

}  // namespace
}  // namespace headstart

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace headstart;
  if (size == 0) return 0;
  static const testing::KvStreamSpec spec;
  static const std::vector<std::byte> kv = MakeKv(spec);
  static const Streams attached{StreamKind::kPrefill, {MakeStream(spec, kv)}};
  static const Streams fetched = [] {
    v1::KvPart stripe;
    stripe.set_stripe_count(2);
    Streams streams{StreamKind::kFetch, {MakeFetchStream(spec, kv, stripe)}};
    stripe.set_stripe_index(1);
    streams.streams.push_back(MakeFetchStream(spec, kv, stripe));
    return streams;
  }();
  const std::string message(reinterpret_cast<const char*>(data + 1), size - 1);
  Run(data[0] < 128 ? attached : fetched, kv, data[0] % 128, message);
  return 0;
}

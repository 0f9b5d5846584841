// One message of a response stream, from a server that is not trusted: the first byte says which
// message of a correct stream the other bytes take the place of. Whatever is accepted is complete
// and right.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "client/kv_receiver.h"
#include "kernels/base/check.h"
#include "tests/client/kv_stream.h"

using headstart::ContiguousKv;
using headstart::KvReceiver;
using headstart::KvReceiverOptions;
using headstart::KvShape;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  static const headstart::testing::KvStreamSpec spec;
  static const std::vector<std::byte> kv = MakeKv(spec);
  static const headstart::testing::KvStream stream = MakeStream(spec, kv);

  std::vector<std::byte> received;
  KvReceiverOptions options;
  options.max_kv_bytes = 1 << 16;
  options.on_manifest = [&](const headstart::v1::KvManifest&, const KvShape& shape) {
    HEADSTART_CHECK(shape.total_bytes() <= 1 << 16);
    received.assign(shape.total_bytes(), std::byte{0});
    return ContiguousKv(shape, absl::MakeSpan(received));
  };
  KvReceiver receiver(options);
  const size_t replaced = data[0] % stream.size();
  const std::string message(reinterpret_cast<const char*>(data + 1), size - 1);
  for (size_t i = 0; i < stream.size(); ++i) {
    grpc::ByteBuffer bytes = headstart::testing::ToByteBuffer(
        i == replaced ? message : stream[i].SerializeAsString(), 1 + data[0]);
    if (!receiver.OnMessage(bytes).ok()) return 0;
  }
  HEADSTART_CHECK(receiver.OnEnd().ok());
  HEADSTART_CHECK(receiver.kv_bytes() == receiver.shape().total_bytes());
  // Only a manifest can change what the bytes mean; the bytes themselves have checksums.
  if (replaced != 1) HEADSTART_CHECK(received == kv);
  return 0;
}

// How fast one thread of the client takes KV: the copy to its place, CRC-32C, and both in
// KvReceiver with all other checks. The messages are those of a server, in slices as gRPC hands
// them over; there is no network. Prints GB of KV a second of CPU time; the best of several rounds.
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "client/checksum.h"
#include "client/kv_receiver.h"
#include "grpcpp/support/byte_buffer.h"
#include "kernels/base/check.h"

namespace headstart {
namespace {

// Llama-3.1-8B: a page is 512 KiB, a chunk one page.
constexpr KvShape kShape{.num_layers = 32,
                         .num_kv_heads = 8,
                         .head_dim = 128,
                         .num_tokens = 4096,
                         .element_bytes = 2,
                         .block_tokens = 128};
constexpr size_t kPageBytes = size_t{128} * 2 * 8 * 128 * 2;
constexpr size_t kSliceBytes = 16 << 10;
constexpr int kRounds = 5;

double CpuSeconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

void Print(const char* what, const std::function<void()>& take_all) {
  double best = 1e9;
  for (int round = 0; round < kRounds; ++round) {
    const double start = CpuSeconds();
    take_all();
    best = std::min(best, CpuSeconds() - start);
  }
  std::printf("%-34s %6.2f GB/s\n", what, static_cast<double>(kShape.total_bytes()) / best / 1e9);
}

struct Memory {
  std::vector<std::byte> bytes = std::vector<std::byte>(kShape.total_bytes());
  KvDestination destination;

  void Contiguous() { destination = *ContiguousKv(kShape, absl::MakeSpan(bytes)); }
  void Paged(PageLayout layout, int64_t page_tokens) {
    Contiguous();
    destination.page_tokens = page_tokens;
    destination.strides = PackedStrides(kShape, layout, page_tokens);
    destination.page_table.clear();
    for (int32_t i = 0; i < kShape.num_tokens / page_tokens; ++i)
      destination.page_table.push_back(i);
  }
};

// One chunk's bytes, which lie in a core's own caches as those that the kernel has just copied.
class Source {
 public:
  Source() {
    for (size_t i = 0; i < page_.size(); ++i) page_[i] = static_cast<char>(i * 131 >> 3);
    for (size_t at = 0; at < kPageBytes; at += kSliceBytes)
      slices_.emplace_back(page_.data() + at, kSliceBytes, grpc::Slice::STATIC_SLICE);
  }

  const std::string& page() const { return page_; }

  // The whole stream of FetchKv, but its completion.
  std::vector<grpc::ByteBuffer> Stream() const {
    v1::PrefillResponse manifest;
    manifest.mutable_manifest()->set_num_tokens(kShape.num_tokens);
    v1::KvLayout& layout = *manifest.mutable_manifest()->mutable_layout();
    layout.set_num_layers(kShape.num_layers);
    layout.set_num_kv_heads(kShape.num_kv_heads);
    layout.set_head_dim(kShape.head_dim);
    layout.set_dtype(v1::KV_DTYPE_BF16);
    layout.set_block_tokens(kShape.block_tokens);
    const grpc::Slice slice(manifest.SerializeAsString());
    std::vector<grpc::ByteBuffer> stream = {grpc::ByteBuffer(&slice, 1)};
    for (uint32_t layer = 0; layer < kShape.num_layers; ++layer) {
      for (uint32_t token = 0; token < kShape.num_tokens; token += kShape.block_tokens)
        stream.push_back(Chunk(static_cast<uint32_t>(stream.size()) - 1, layer, token));
    }
    return stream;
  }

 private:
  grpc::ByteBuffer Chunk(uint32_t index, uint32_t layer, uint32_t token) const {
    v1::KvChunk chunk;
    chunk.set_index(index);
    chunk.set_layer(layer);
    chunk.set_token_begin(token);
    chunk.set_token_count(kShape.block_tokens);
    chunk.set_kv_head_count(kShape.num_kv_heads);
    chunk.set_crc32c(ExtendCrc32c(
        ChunkHeaderCrc32c({index, layer, token, chunk.token_count(), 0, chunk.kv_head_count()}),
        page_));
    // Field 15, then the event that holds the chunk: each a tag and a length.
    const std::string fields = chunk.SerializeAsString() + "\x7a" + Varint(kPageBytes);
    std::vector<grpc::Slice> slices = {
        grpc::Slice("\x1a" + Varint(fields.size() + kPageBytes) + fields)};
    slices.insert(slices.end(), slices_.begin(), slices_.end());
    return grpc::ByteBuffer(slices.data(), slices.size());
  }

  static std::string Varint(size_t number) {
    std::string bytes;
    for (; number >= 128; number >>= 7) bytes += static_cast<char>(number | 128);
    return bytes + static_cast<char>(number);
  }

  std::string page_ = std::string(kPageBytes, '\0');
  std::vector<grpc::Slice> slices_;
};

void Scatter(const Source& source, const KvDestination& destination) {
  for (int64_t layer = 0; layer < kShape.num_layers; ++layer) {
    for (int64_t token = 0; token < kShape.num_tokens; token += kShape.block_tokens) {
      ChunkScatter scatter(destination, kShape, {layer, token, kShape.block_tokens});
      for (size_t at = 0; at < kPageBytes; at += kSliceBytes)
        scatter.Write(absl::string_view(source.page()).substr(at, kSliceBytes));
    }
  }
}

void Receive(std::vector<grpc::ByteBuffer>& stream, const KvDestination* destination) {
  KvReceiverOptions options;
  if (destination != nullptr) {
    options.on_manifest = [destination](const v1::KvManifest&, const KvShape&) {
      return *destination;
    };
  }
  KvAssembly assembly(options);
  KvReceiver receiver(StreamKind::kFetch, &assembly);
  for (grpc::ByteBuffer& message : stream) HEADSTART_CHECK(receiver.OnMessage(message).ok());
}

void Run() {
  const Source source;
  std::vector<grpc::ByteBuffer> stream = source.Stream();
  Memory memory;
  Print("memcpy", [&] {
    for (int64_t at = 0; at < kShape.total_bytes(); at += kPageBytes)
      std::memcpy(memory.bytes.data() + at, source.page().data(), kPageBytes);
  });
  Print("checked, dropped", [&] { Receive(stream, nullptr); });
  const auto print_both = [&](const std::string& place) {
    Print((place + ", copied").c_str(), [&] { Scatter(source, memory.destination); });
    Print((place + ", checked").c_str(), [&] { Receive(stream, &memory.destination); });
  };
  memory.Contiguous();
  print_both("contiguous");
  for (const int64_t page_tokens : {16, 64, 128, 256}) {
    memory.Paged(PageLayout::kHnd, page_tokens);
    print_both("HND, pages of " + std::to_string(page_tokens));
    memory.Paged(PageLayout::kNhd, page_tokens);
    print_both("NHD, pages of " + std::to_string(page_tokens));
  }
}

}  // namespace
}  // namespace headstart

int main() { headstart::Run(); }

#include "tests/server/fetching.h"

#include <algorithm>
#include <cstring>

#include "kernels/base/instant.h"
#include "proto/grpc_time.h"
#include "server/rpc/chunk_frame.h"

namespace headstart::testing {
namespace {

// The tests compute in f32.
int64_t ElementBytes(const v1::KvLayout& layout) {
  return layout.dtype() == v1::KV_DTYPE_FP8_E4M3 ? 1 : 4;
}

}  // namespace

KvImage::KvImage(const v1::KvManifest& manifest, int64_t skip_tokens)
    : is_fp8_(manifest.layout().dtype() == v1::KV_DTYPE_FP8_E4M3),
      heads_(manifest.layout().num_kv_heads()),
      tokens_(manifest.num_tokens() - skip_tokens),
      row_(manifest.layout().head_dim() * ElementBytes(manifest.layout())),
      skip_(skip_tokens) {
  const int64_t rows = int64_t{manifest.layout().num_layers()} * 2 * heads_ * tokens_;
  bytes_.assign(static_cast<size_t>(rows * row_), '\0');
  seen_.assign(static_cast<size_t>(rows), false);
  if (!is_fp8_) return;
  const int64_t pages = NumBlocks(manifest.num_tokens()) - skip_ / kBlockTokens;
  scales_.assign(static_cast<size_t>(manifest.layout().num_layers() * pages * 2 * heads_), 0.0f);
}

size_t KvImage::PlaceScales(const v1::KvChunk& chunk, int64_t page, size_t from) {
  const size_t bytes = chunk.kv_head_count() * sizeof(float);  // of K or V
  if (from + 2 * bytes > chunk.data().size()) {
    ADD_FAILURE() << "no scales of page " << page;
    return 0;
  }
  const int64_t pages = NumBlocks(skip_ + tokens_) - skip_ / kBlockTokens;
  const int64_t place = chunk.layer() * pages + page - skip_ / kBlockTokens;
  for (const int64_t plane : {0, 1}) {
    const int64_t first = (place * 2 + plane) * heads_ + chunk.kv_head_begin();
    std::memcpy(scales_.data() + first, chunk.data().data() + from + plane * bytes, bytes);
  }
  return 2 * bytes;
}

void KvImage::Place(const v1::KvChunk& chunk) {
  const ChunkHeader header = {chunk.index(),       chunk.layer(),         chunk.token_begin(),
                              chunk.token_count(), chunk.kv_head_begin(), chunk.kv_head_count()};
  const ByteRun data(reinterpret_cast<const std::byte*>(chunk.data().data()), chunk.data().size());
  EXPECT_EQ(chunk.crc32c(), ChunkCrc32c(header, {data}));
  size_t from = 0;
  size_t scale_bytes = 0;
  const int64_t end = chunk.token_begin() + chunk.token_count();
  for (int64_t token = chunk.token_begin(); token < end;) {
    const int64_t page_end = std::min<int64_t>(end, (token / kBlockTokens + 1) * kBlockTokens);
    if (is_fp8_) {
      const size_t bytes = PlaceScales(chunk, token / kBlockTokens, from);
      from += bytes;
      scale_bytes += bytes;
    }
    for (int64_t plane = 0; plane < 2; ++plane) {
      for (int64_t head = 0; head < chunk.kv_head_count(); ++head) {
        for (int64_t t = token; t < page_end; ++t) {
          const int64_t row =
              ((chunk.layer() * 2 + plane) * heads_ + chunk.kv_head_begin() + head) * tokens_ + t -
              skip_;
          EXPECT_FALSE(seen_[static_cast<size_t>(row)])
              << "layer " << chunk.layer() << " token " << t;
          seen_[static_cast<size_t>(row)] = true;
          bytes_.replace(static_cast<size_t>(row * row_), static_cast<size_t>(row_), chunk.data(),
                         from, static_cast<size_t>(row_));
          from += static_cast<size_t>(row_);
        }
      }
    }
    token = page_end;
  }
  EXPECT_EQ(from, chunk.data().size());
  placed_ += from - scale_bytes;
}

KvImage ImageOf(const CallResult& result) {
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  v1::KvManifest manifest;
  for (const v1::PrefillResponse& response : result.responses) {
    if (response.has_manifest()) manifest = response.manifest();
  }
  KvImage image(manifest, manifest.skip_tokens());
  for (const v1::PrefillResponse& response : result.responses) {
    if (response.has_chunk()) image.Place(response.chunk());
  }
  EXPECT_TRUE(image.complete());
  return image;
}

v1::PrefillRequest DetachedPrompt(int64_t count, const std::vector<v1::KvPart>& readers) {
  v1::PrefillRequest request = Prompt(count);
  request.mutable_detached()->mutable_readers()->Add(readers.begin(), readers.end());
  return request;
}

v1::KvPart Stripe(uint32_t index, uint32_t count) {
  v1::KvPart part;
  part.set_stripe_index(index);
  part.set_stripe_count(count);
  return part;
}

std::vector<v1::KvPart> Stripes(uint32_t count) {
  std::vector<v1::KvPart> parts;
  for (uint32_t i = 0; i < count; ++i) parts.push_back(Stripe(i, count));
  return parts;
}

OpenFetch::OpenFetch(v1::PrefillService::Stub* stub, const std::string& fetch_id,
                     const v1::KvPart& part, uint32_t from_chunk)
    : num_chunks_(from_chunk) {
  context_.set_deadline(Instant::Now() + kCallLimit);
  stream_ = stub->FetchKv(&context_);
  v1::FetchKvRequest request;
  request.mutable_fetch()->set_fetch_id(fetch_id);
  *request.mutable_fetch()->mutable_part() = part;
  request.mutable_fetch()->set_from_chunk(from_chunk);
  stream_->Write(request);  // a call that has ended says so in Finish
}

bool OpenFetch::Read(v1::PrefillResponse* response) {
  if (!stream_->Read(response)) return false;
  if (response->has_chunk()) {
    EXPECT_EQ(response->chunk().index(), num_chunks_);
    ++num_chunks_;
  }
  return true;
}

void OpenFetch::ReadChunks(uint32_t count, KvImage* image) {
  v1::PrefillResponse response;
  while (num_chunks_ < count) {
    ASSERT_TRUE(Read(&response)) << "ended after " << num_chunks_ << " chunks";
    ASSERT_FALSE(response.has_completed());
    if (response.has_chunk()) image->Place(response.chunk());
  }
}

void OpenFetch::Acknowledge(uint32_t num_chunks) {
  v1::FetchKvRequest request;
  request.mutable_ack()->set_num_chunks(num_chunks);
  stream_->Write(request);
}

CallResult OpenFetch::Finish(KvImage* image) {
  CallResult result;
  v1::PrefillResponse response;
  while (Read(&response)) {
    if (response.has_chunk() && image != nullptr) image->Place(response.chunk());
    result.responses.push_back(response);
  }
  stream_->WritesDone();
  result.status = stream_->Finish();
  return result;
}

}  // namespace headstart::testing

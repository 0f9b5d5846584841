// Detached KV without a client library: what is asked, and what came.
#pragma once

#include <grpcpp/grpcpp.h>

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "tests/server/server_fixture.h"

namespace headstart::testing {

// KV of a prompt, or of a part of it, put together from its chunks.
class KvImage {
 public:
  // Room for the tokens from `skip_tokens` on of the manifest's prompt.
  KvImage(const v1::KvManifest& manifest, int64_t skip_tokens = 0);

  // Fails the test when the chunk's checksum is wrong or its bytes came before.
  void Place(const v1::KvChunk& chunk);
  // What came, all layers and heads: [layer][K, V][head][token][dim]; zeros where nothing did.
  const std::string& bytes() const { return bytes_; }
  // Of fp8: [layer][page][K, V][head], the first page that of the first token that comes.
  const std::vector<float>& scales() const { return scales_; }
  bool complete() const { return placed_ == bytes_.size(); }

 private:
  // The scales in front of a page; the bytes that they have.
  size_t PlaceScales(const v1::KvChunk& chunk, int64_t page, size_t from);

  const bool is_fp8_;
  int64_t heads_, tokens_, row_, skip_;
  std::string bytes_;
  std::vector<bool> seen_;  // by row
  std::vector<float> scales_;
  size_t placed_ = 0;
};

// Of a call that ended well and carried all KV that its manifest promises.
KvImage ImageOf(const CallResult& result);

// A prompt whose KV is fetched; `readers` are announced.
v1::PrefillRequest DetachedPrompt(int64_t count, const std::vector<v1::KvPart>& readers = {});

// Stripe i of n of everything.
v1::KvPart Stripe(uint32_t index, uint32_t count);
std::vector<v1::KvPart> Stripes(uint32_t count);

// A FetchKv call that is under way.
class OpenFetch {
 public:
  OpenFetch(v1::PrefillService::Stub* stub, const std::string& fetch_id, const v1::KvPart& part,
            uint32_t from_chunk = 0);

  // The next message; false at the end.
  bool Read(v1::PrefillResponse* response);
  // Chunks into `image`, until there are `count` of them from the start of the part on; fails the
  // test when the stream ends before.
  void ReadChunks(uint32_t count, KvImage* image);
  // Acknowledges; what else is written goes through stream().
  void Acknowledge(uint32_t num_chunks);
  // Reads to the end. Of a stream that ends OK the last message is a completion.
  CallResult Finish(KvImage* image = nullptr);

  grpc::ClientContext& context() { return context_; }
  grpc::ClientReaderWriter<v1::FetchKvRequest, v1::PrefillResponse>& stream() { return *stream_; }
  uint32_t num_chunks() const { return num_chunks_; }  // of the part, up to here

 private:
  grpc::ClientContext context_;
  std::unique_ptr<grpc::ClientReaderWriter<v1::FetchKvRequest, v1::PrefillResponse>> stream_;
  uint32_t num_chunks_;
};

}  // namespace headstart::testing

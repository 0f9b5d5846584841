#include "client/response_decoder.h"

#include <gtest/gtest.h>

#include <string>

#include "absl/strings/str_cat.h"
#include "tests/client/kv_stream.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::StatusIs;
using testing::ToByteBuffer;

std::string JoinedData(const KvChunkView& chunk) {
  std::string data;
  for (const absl::string_view piece : chunk.data) absl::StrAppend(&data, piece);
  return data;
}

v1::PrefillResponse SomeChunk() {
  v1::PrefillResponse response;
  v1::KvChunk& chunk = *response.mutable_chunk();
  chunk.set_index(300);
  chunk.set_layer(1);
  chunk.set_token_begin(256);
  chunk.set_token_count(128);
  chunk.set_kv_head_begin(2);
  chunk.set_kv_head_count(6);
  chunk.set_crc32c(0xdeadbeef);
  for (int i = 0; i < 1000; ++i) chunk.mutable_data()->push_back(static_cast<char>(i));
  return response;
}

TEST(ResponseDecoderTest, ReadsAChunkThroughAnySlices) {
  const v1::PrefillResponse response = SomeChunk();
  for (const size_t slice : {1, 3, 16, 100, 5000}) {
    grpc::ByteBuffer message = ToByteBuffer(response.SerializeAsString(), slice);
    ASSERT_OK_AND_ASSIGN(const ResponseEvent event, DecodeResponse(message));
    const KvChunkView& chunk = std::get<KvChunkView>(event);
    EXPECT_EQ(chunk.index, 300);
    EXPECT_EQ(chunk.layer, 1);
    EXPECT_EQ(chunk.token_begin, 256);
    EXPECT_EQ(chunk.token_count, 128);
    EXPECT_EQ(chunk.kv_head_begin, 2);
    EXPECT_EQ(chunk.kv_head_count, 6);
    EXPECT_EQ(chunk.crc32c, 0xdeadbeef);
    EXPECT_EQ(chunk.data_bytes(), 1000);
    EXPECT_EQ(JoinedData(chunk), response.chunk().data());
  }
}

TEST(ResponseDecoderTest, ReadsTheOtherEvents) {
  v1::PrefillResponse response;
  response.mutable_accepted()->set_queue_tokens(77);
  grpc::ByteBuffer accepted = ToByteBuffer(response.SerializeAsString(), 2);
  ASSERT_OK_AND_ASSIGN(ResponseEvent event, DecodeResponse(accepted));
  EXPECT_EQ(std::get<v1::Accepted>(event).queue_tokens(), 77);

  response.mutable_manifest()->set_model("m");
  grpc::ByteBuffer manifest = ToByteBuffer(response.SerializeAsString(), 2);
  ASSERT_OK_AND_ASSIGN(event, DecodeResponse(manifest));
  EXPECT_EQ(std::get<v1::KvManifest>(event).model(), "m");

  response.mutable_completed()->set_crc32c(9);
  grpc::ByteBuffer completed = ToByteBuffer(response.SerializeAsString(), 2);
  ASSERT_OK_AND_ASSIGN(event, DecodeResponse(completed));
  EXPECT_EQ(std::get<v1::CheckedCompletion>(event).crc32c(), 9);
}

// Field 100 of each wire type, as a later version might add them.
const char* const kUnknownFields[] = {"\xa0\x06\x05",
                                      "\xa1\x06"
                                      "12345678",
                                      "\xa2\x06\x03"
                                      "abc",
                                      "\xa5\x06"
                                      "1234"};

TEST(ResponseDecoderTest, SkipsUnknownFieldsOfTheResponse) {
  for (const char* unknown : kUnknownFields) {
    const std::string bytes = absl::StrCat(unknown, SomeChunk().SerializeAsString(), unknown);
    grpc::ByteBuffer message = ToByteBuffer(bytes, 7);
    ASSERT_OK_AND_ASSIGN(const ResponseEvent event, DecodeResponse(message));
    EXPECT_EQ(std::get<KvChunkView>(event).index, 300);
  }
}

TEST(ResponseDecoderTest, SkipsUnknownFieldsOfAChunk) {
  for (const char* unknown : kUnknownFields) {
    const std::string chunk =
        absl::StrCat(unknown, SomeChunk().chunk().SerializeAsString(), unknown);
    const std::string length = {static_cast<char>(chunk.size() % 128 | 128),
                                static_cast<char>(chunk.size() / 128)};
    grpc::ByteBuffer message = ToByteBuffer(absl::StrCat("\x1a", length, chunk), 7);
    ASSERT_OK_AND_ASSIGN(const ResponseEvent event, DecodeResponse(message));
    EXPECT_EQ(JoinedData(std::get<KvChunkView>(event)), SomeChunk().chunk().data());
  }
}

TEST(ResponseDecoderTest, RefusesEveryTruncation) {
  const std::string bytes = SomeChunk().SerializeAsString();
  for (size_t size = 0; size < bytes.size(); ++size) {
    grpc::ByteBuffer message = ToByteBuffer(bytes.substr(0, size), 11);
    EXPECT_THAT(DecodeResponse(message), StatusIs(absl::StatusCode::kDataLoss)) << size;
  }
}

TEST(ResponseDecoderTest, RefusesTwoEventsInOneMessage) {
  const std::string bytes = SomeChunk().SerializeAsString();
  grpc::ByteBuffer message = ToByteBuffer(bytes + bytes, 100);
  EXPECT_THAT(DecodeResponse(message), StatusIs(absl::StatusCode::kDataLoss));
}

TEST(ResponseDecoderTest, RefusesGarbage) {
  // A group, a field number 0, a length beyond int, an overlong varint.
  for (const std::string& bytes :
       {std::string("\x1b\x1c"), std::string("\0\0", 2), std::string("\x1a\xff\xff\xff\xff\x0f"),
        std::string("\x1a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")}) {
    grpc::ByteBuffer message = ToByteBuffer(bytes, 100);
    EXPECT_THAT(DecodeResponse(message), StatusIs(absl::StatusCode::kDataLoss));
  }
  grpc::ByteBuffer empty;
  EXPECT_THAT(DecodeResponse(empty), StatusIs(absl::StatusCode::kDataLoss));
}

}  // namespace
}  // namespace headstart

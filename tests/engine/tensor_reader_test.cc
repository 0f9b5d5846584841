#include "engine/model/tensor_reader.h"

#include <gtest/gtest.h>
#include <openssl/sha.h>

#include <cstring>
#include <filesystem>
#include <string>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

using ::testing::HasSubstr;
using testing::StatusIs;
using testing::TempDir;

constexpr int64_t kTensorBytes = 2 * kHashedBytes + 1000;  // two whole parts and a piece
constexpr int64_t kOffset = 13;

// Bytes that are finite whatever they are taken for, and differ from place to place.
std::string SomeBytes(int64_t count) {
  std::string bytes(static_cast<size_t>(count), '\0');
  for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>((i * i + i / 1000) % 97);
  return bytes;
}

std::string Digest(const std::string& bytes) {
  std::string digest(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(digest.data()));
  return digest;
}

std::string Text(const Sha256& digest) {
  return std::string(reinterpret_cast<const char*>(digest.data()), digest.size());
}

class TensorReaderTest : public ::testing::Test {
 protected:
  void SetUp() override { Write(std::string(kOffset, 'x') + content_); }
  void Write(const std::string& bytes) {
    ASSERT_OK(testing::WriteFile(dir_ / "file", bytes));
    ASSERT_OK_AND_ASSIGN(file_, ModelFile::Open(dir_ / "file", "the file"));
  }
  StoredTensor Tensor(DType dtype, int64_t offset = kOffset, int64_t bytes = kTensorBytes) const {
    return {&*file_, "t", dtype, {bytes / DTypeBytes(dtype)}, offset, bytes};
  }

  TempDir dir_;
  std::string content_ = SomeBytes(kTensorBytes);
  std::optional<ModelFile> file_;
};

TEST_F(TensorReaderTest, HashesWhatItGivesOutInParts) {
  const auto part = static_cast<size_t>(kHashedBytes);
  const std::string wanted =
      Digest(Digest(content_.substr(0, part)) + Digest(content_.substr(part, part)) +
             Digest(content_.substr(2 * part)));
  for (const int32_t num_threads : {1, 3, 64}) {
    std::string first(static_cast<size_t>(kTensorBytes), '\0');
    std::string second(10, '\0');
    const std::vector<TensorRead> reads = {
        {Tensor(DType::kBF16), reinterpret_cast<std::byte*>(first.data())},
        {Tensor(DType::kBF16, kOffset + 1, 10), reinterpret_cast<std::byte*>(second.data())},
        {Tensor(DType::kF32), nullptr}};
    ASSERT_OK_AND_ASSIGN(const std::vector<Sha256> digests, ReadTensors(reads, num_threads));
    EXPECT_EQ(first, content_);
    EXPECT_EQ(second, content_.substr(1, 10));
    EXPECT_EQ(Text(digests[0]), wanted);
    EXPECT_EQ(Text(digests[1]), Digest(Digest(content_.substr(1, 10))));
    EXPECT_EQ(Text(digests[2]), wanted);
  }
}

TEST_F(TensorReaderTest, FindsTheFirstValueThatIsNotFinite) {
  for (const auto& [dtype, bits] :
       {std::pair{DType::kBF16, uint32_t{0xff80}}, std::pair{DType::kF16, uint32_t{0x7c00}},
        std::pair{DType::kF32, uint32_t{0x7f800001}}}) {
    const int64_t width = DTypeBytes(dtype);
    std::string bytes = content_;
    for (const int64_t index : {kTensorBytes / width - 1, kHashedBytes / width, int64_t{0}}) {
      std::memcpy(bytes.data() + index * width, &bits, static_cast<size_t>(width));
      Write(std::string(kOffset, 'x') + bytes);
      EXPECT_THAT(
          ReadTensors({{Tensor(dtype), nullptr}}, 1),
          StatusIs(absl::StatusCode::kInvalidArgument,
                   "the file: tensor \"t\": element " + std::to_string(index) + " is not finite"));
    }
  }
}

TEST_F(TensorReaderTest, SaysWhenTheFileIsShorterByNow) {
  std::filesystem::resize_file(dir_ / "file", kOffset + kHashedBytes + 5);
  EXPECT_THAT(ReadTensors({{Tensor(DType::kBF16), nullptr}}, 2),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("the file: ends at byte")));
}

}  // namespace
}  // namespace headstart

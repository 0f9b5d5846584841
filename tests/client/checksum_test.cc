#include "client/checksum.h"

#include <gtest/gtest.h>

#include <vector>

#include "absl/strings/escaping.h"
#include "tests/client/kv_stream.h"

namespace headstart {
namespace {

// RFC 3720, appendix B.4.
TEST(Crc32cTest, AgreesWithTheIscsiStandard) {
  EXPECT_EQ(ExtendCrc32c(0, std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(ExtendCrc32c(0, std::string(32, '\xff')), 0x62a8ab43u);
  EXPECT_EQ(ExtendCrc32c(0, "123456789"), 0xe3069283u);
}

TEST(Crc32cTest, GoesOnWhereItEnded) {
  const std::string text = "Headstart ships the KV cache while it computes";
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    EXPECT_EQ(ExtendCrc32c(ExtendCrc32c(0, text.substr(0, cut)), text.substr(cut)),
              testing::SlowCrc32c(text));
  }
}

TEST(Crc32cTest, ChunkHeaderIsSixLittleEndianNumbers) {
  const std::string bytes =
      absl::HexStringToBytes("010000000203000000000004000000000500000006000000");
  EXPECT_EQ(ChunkHeaderCrc32c({1, 0x0302, 0x04000000, 0, 5, 6}), testing::SlowCrc32c(bytes));
}

// python3 -c 'import hashlib,struct; print(hashlib.sha256(struct.pack("<3I", 1, 256,
// 151935)).hexdigest())'
TEST(TokenHashTest, IsSha256OverLittleEndianIds) {
  const std::vector<uint32_t> ids = {1, 256, 151935};
  EXPECT_EQ(absl::BytesToHexString(TokenHash(ids)),
            "6eb4ac7bce345ae739b5896fef17e819f3b7c5c5c63e8bcbbd44680763d8ca57");
}

}  // namespace
}  // namespace headstart

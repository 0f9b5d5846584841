#include "server/rpc/rich_status.h"

#include <gtest/gtest.h>

#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/error.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"
#include "headstart/v1/prefill.pb.h"
#include "kernels/base/nonfinite.h"

namespace headstart {
namespace {

google::rpc::Status Details(const grpc::Status& status) {
  google::rpc::Status rich;
  EXPECT_TRUE(rich.ParseFromString(status.error_details()));
  EXPECT_EQ(rich.code(), status.error_code());
  EXPECT_EQ(rich.message(), status.error_message());
  return rich;
}

// The detail of type T; an empty one when there is none.
template <typename T>
T Detail(const grpc::Status& status) {
  T detail;
  const google::rpc::Status rich = Details(status);
  for (const auto& any : rich.details()) any.UnpackTo(&detail);
  return detail;
}

TEST(RichStatusTest, OkCarriesNothing) {
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).ok());
  EXPECT_TRUE(ToGrpcStatus(absl::OkStatus()).error_details().empty());
}

TEST(RichStatusTest, SaysReasonAndDomain) {
  const grpc::Status status = ToGrpcStatus(
      MakeError(absl::StatusCode::kNotFound, ErrorReason::kUnknownModel, "no such model"));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
  const auto info = Detail<google::rpc::ErrorInfo>(status);
  EXPECT_EQ(info.reason(), "UNKNOWN_MODEL");
  EXPECT_EQ(info.domain(), "headstart.v1");
}

TEST(RichStatusTest, NamesTheFieldOfAnEngineError) {
  const grpc::Status status = ToGrpcStatus(
      absl::InvalidArgumentError("token_ids[17]=151999 is not below vocab_size 151936"));
  const auto bad = Detail<google::rpc::BadRequest>(status);
  ASSERT_EQ(bad.field_violations_size(), 1);
  EXPECT_EQ(bad.field_violations(0).field(), "token_ids[17]");
  EXPECT_EQ(bad.field_violations(0).description(), status.error_message());
}

TEST(RichStatusTest, SaysWhenToComeBack) {
  const grpc::Status status =
      ToGrpcStatus(MakeRetryableError(absl::StatusCode::kResourceExhausted, ErrorReason::kQueueFull,
                                      "full", absl::Milliseconds(2500)));
  const auto retry = Detail<google::rpc::RetryInfo>(status);
  EXPECT_EQ(retry.retry_delay().seconds(), 2);
  EXPECT_EQ(retry.retry_delay().nanos(), 500000000);
}

TEST(RichStatusTest, StaysSmallWhateverTheMessage) {
  const grpc::Status status = ToGrpcStatus(absl::InternalError(std::string(1 << 20, 'x')));
  EXPECT_LT(status.error_details().size() + status.error_message().size(), 4096u);
}

TEST(RichStatusTest, TellsNonFiniteOutputFromALostBackend) {
  EXPECT_EQ(Detail<google::rpc::ErrorInfo>(ToGrpcStatus(NonFiniteError("layer 3"))).reason(),
            "NONFINITE_OUTPUT");
  EXPECT_EQ(Detail<google::rpc::ErrorInfo>(ToGrpcStatus(absl::InternalError("gone"))).reason(),
            "INTERNAL");
}

TEST(ErrorReasonTest, IsTheEnumOfTheWireFormat) {
  const auto* wire = v1::ErrorReason_descriptor();
  ASSERT_EQ(wire->value_count(), kNumErrorReasons);
  for (int i = 1; i < kNumErrorReasons; ++i) {
    const auto* value = wire->FindValueByNumber(i);
    ASSERT_NE(value, nullptr) << i;
    EXPECT_EQ(value->name(),
              absl::StrCat("ERROR_REASON_", ErrorReasonName(static_cast<ErrorReason>(i))));
  }
}

// The table of server/REFERENCE.md: | code | reason, reason | when |.
TEST(RichStatusTest, ReadmeHasEveryReasonAndKnownCodes) {
  std::set<std::string> codes, reasons, expected_reasons;
  std::ifstream readme(HEADSTART_SOURCE_DIR "/server/REFERENCE.md");
  bool in_section = false;
  for (std::string line; std::getline(readme, line);) {
    if (absl::StartsWith(line, "## ")) in_section = line == "## Status codes";
    const std::vector<std::string> cells = absl::StrSplit(line, " | ");
    if (!in_section || cells.size() != 3 || !absl::StartsWith(line, "| ")) continue;
    codes.insert(cells[0].substr(2));
    for (const absl::string_view reason : absl::StrSplit(cells[1], ", ")) reasons.emplace(reason);
  }
  for (int i = 1; i < kNumErrorReasons; ++i)
    expected_reasons.emplace(ErrorReasonName(static_cast<ErrorReason>(i)));
  for (const char* not_ours : {"reason", "(gRPC's own)"}) EXPECT_EQ(reasons.erase(not_ours), 1);
  EXPECT_EQ(codes.erase("code"), 1);
  EXPECT_EQ(reasons, expected_reasons);
  for (const std::string& code : codes) {
    bool known = false;
    for (int i = 1; i <= 16; ++i)
      known |= absl::StatusCodeToString(static_cast<absl::StatusCode>(i)) == code;
    EXPECT_TRUE(known) << code;
  }
}

}  // namespace
}  // namespace headstart

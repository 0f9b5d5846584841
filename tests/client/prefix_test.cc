// The start of a prompt: pages that the client holds, pages from the server's cache, and their
// names.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "client/kv_receiver.h"
#include "client/page_names.h"
#include "client/prefill_client.h"
#include "client/prefix_check.h"
#include "tests/client/fake_server.h"
#include "tests/client/kv_stream.h"
#include "tests/testing/status_matchers.h"

namespace headstart {
namespace {

using testing::CompletedIn;
using testing::EditCompleted;
using testing::FakeServer;
using testing::FetchReaderWriter;
using ::testing::HasSubstr;
using testing::KvStreamSpec;
using testing::PrefillWriter;
using testing::StatusIs;

constexpr uint32_t kPage = 4;  // tokens of a page

class PrefixTest : public ::testing::Test {
 protected:
  PrefixTest() {
    Rebuild();
    const auto& ids = request_.token_ids();
    expected_.token_ids.assign(ids.begin(), ids.end());
  }

  // A server that skips so many tokens of 21, and knows the names of the five whole pages.
  void Rebuild(uint32_t skip_tokens = 0) {
    spec_.skip_tokens = skip_tokens;
    stream_ = MakeStream(spec_, kv_);
    manifest_ = stream_[1].mutable_manifest();
    manifest_->mutable_cache_root()->set_salt("salt");
    names_ = PageNames(*manifest_, {request_.token_ids().data(), 21});
    EditCompleted(&stream_.back(), [this](v1::Completed& completed) {
      completed.mutable_manifest()->mutable_cache_root()->set_salt("salt");
      completed.mutable_manifest()->set_page_hashes(names_);
    });
  }
  std::string Names(size_t first, size_t count) const {
    return names_.substr(first * kPageNameBytes, count * kPageNameBytes);
  }

  void ExpectWrong(const std::string& what) {
    EXPECT_THAT(CheckPrefix(*manifest_, expected_),
                StatusIs(absl::StatusCode::kDataLoss, HasSubstr(what)));
  }
  // What the check of a final manifest says that `edit` changed.
  absl::Status CheckFinal(const std::function<void(v1::KvManifest&)>& edit) {
    v1::KvManifest last = CompletedIn(stream_.back()).manifest();
    edit(last);
    return CheckCachedPrefix(last, expected_);
  }
  void ExpectWrongEnd(const std::function<void(v1::KvManifest&)>& edit, const std::string& what) {
    EXPECT_THAT(CheckFinal(edit), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(what)));
  }

  KvStreamSpec spec_{.block_tokens = kPage};
  v1::PrefillRequest request_ = RequestFor(spec_);
  const std::vector<std::byte> kv_ = MakeKv(spec_);
  testing::KvStream stream_;
  v1::KvManifest* manifest_ = nullptr;  // the first one of stream_
  std::string names_;
  KvExpectation expected_;
};

// ---- names

TEST_F(PrefixTest, NamesAreThoseOfTheWireFormat) {  // computed with Python's hashlib
  ASSERT_EQ(names_.size(), 5 * kPageNameBytes);
  EXPECT_EQ(absl::BytesToHexString(Names(0, 2)),
            "67a67b6f16ec4c1c5802bf5ac1441bbc79300f634ed74c0c03134c609747196a");
  EXPECT_EQ(absl::BytesToHexString(Names(4, 1)), "e75ce8a0ca1aac907db3fb3dfdb64b0e");
}

TEST_F(PrefixTest, NamesDependOnEverythingBefore) {
  const std::string before = names_;
  request_.set_token_ids(kPage, 999);  // of the second page
  Rebuild();
  EXPECT_EQ(Names(0, 1), before.substr(0, kPageNameBytes));
  for (size_t page = 1; page < 5; ++page)
    EXPECT_NE(Names(page, 1), before.substr(page * kPageNameBytes, kPageNameBytes));
  const auto names_with = [this](const std::function<void(v1::KvManifest&)>& edit) {
    v1::KvManifest other = *manifest_;
    edit(other);
    return PageNames(other, {request_.token_ids().data(), kPage});
  };
  const std::string own = Names(0, 1);
  EXPECT_EQ(names_with([](v1::KvManifest& m) { m.set_model("another name"); }), own);
  EXPECT_NE(names_with([](v1::KvManifest& m) { m.set_model_hash("ab"); }), own);
  EXPECT_NE(names_with([](v1::KvManifest& m) { m.mutable_cache_root()->set_salt("s"); }), own);
  EXPECT_NE(names_with([](v1::KvManifest& m) { m.mutable_cache_root()->set_piece_tokens(8); }),
            own);
}

TEST_F(PrefixTest, CountsHeldPagesFromTheFirstOne) {
  EXPECT_EQ(CountHeldPages(names_, Names(2, 1) + Names(0, 2)), 3);
  EXPECT_EQ(CountHeldPages(names_, Names(1, 4)), 0);
  EXPECT_EQ(CountHeldPages(names_, names_ + std::string(kPageNameBytes, 'x')), 5);
  EXPECT_EQ(CountHeldPages(names_, ""), 0);
  EXPECT_EQ(CountHeldPages("", names_), 0);
}

// ---- what may be skipped

TEST_F(PrefixTest, SkipsWhatWasAskedForAndPagesThatAreHeld) {
  expected_.skip_tokens = 3;
  expected_.held_pages = Names(0, 3);
  for (const uint32_t skip : {3u, 4u, 12u}) {
    manifest_->set_skip_tokens(skip);
    EXPECT_OK(CheckPrefix(*manifest_, expected_)) << skip;
  }
  manifest_->set_skip_tokens(2);
  ExpectWrong("skip_tokens=2, the request skips 3, and pages are held up to token 12");
  manifest_->set_skip_tokens(13);
  ExpectWrong("skip_tokens=13, the request skips 3");
  manifest_->set_skip_tokens(21);
  ExpectWrong("skip_tokens=21 leaves none of num_tokens=21");
}

TEST_F(PrefixTest, SkipsNoPageThatIsNotHeldUnderThisRoot) {
  expected_.held_pages = names_;
  manifest_->set_skip_tokens(kPage);
  EXPECT_OK(CheckPrefix(*manifest_, expected_));
  manifest_->mutable_cache_root()->set_salt("other");
  ExpectWrong("held up to token 0");
  manifest_->mutable_cache_root()->set_salt("salt");
  expected_.token_ids.clear();
  ExpectWrong("held up to token 0");
}

TEST_F(PrefixTest, ReceivesWhatIsBehindHeldPages) {
  Rebuild(2 * kPage);
  FakeServer server([this](int, grpc::ServerContext&, PrefillWriter& writer) {
    testing::WriteStream(stream_, writer);
    return grpc::Status::OK;
  });
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create({.target = server.target()}));
  std::vector<std::byte> received;
  KvReceiverOptions receive;
  receive.on_manifest = [&](const v1::KvManifest&, const KvShape& shape) {
    EXPECT_EQ(shape.token_begin, 2 * kPage);
    received.assign(shape.total_bytes(), std::byte{0});
    return ContiguousKv(shape, absl::MakeSpan(received));
  };
  request_.set_held_pages(Names(0, 2));
  ASSERT_OK_AND_ASSIGN(const PrefillOutcome outcome, client->Prefill(request_, receive));
  EXPECT_EQ(received, PartOf(spec_, kv_));
  EXPECT_EQ(outcome.completed.manifest().skip_tokens(), 2 * kPage);
  EXPECT_EQ(outcome.completed.manifest().page_hashes(), names_);
  request_.set_held_pages(Names(0, 1));
  EXPECT_THAT(client->Prefill(request_, receive),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("held up to token 4")));
}

TEST_F(PrefixTest, FetchesWhatIsBehindHeldPages) {
  Rebuild(2 * kPage);
  FakeServer server([](int, grpc::ServerContext&, PrefillWriter&) { return grpc::Status::OK; },
                    [this](const v1::KvFetch& fetch, FetchReaderWriter& stream) {
                      stream_.erase(stream_.begin());  // a fetch has no `accepted`
                      testing::WriteFetch(stream_, fetch, stream);
                      testing::ReadAcks(stream);
                      return grpc::Status::OK;
                    });
  ASSERT_OK_AND_ASSIGN(const auto client, PrefillClient::Create({.target = server.target()}));
  KvReceiverOptions receive;
  receive.expected.held_pages = Names(0, 2);
  EXPECT_THAT(client->Fetch({.fetch_id = testing::FetchId()}, {}, 1, receive),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("token_ids")));
  receive.expected.token_ids = expected_.token_ids;
  ASSERT_OK_AND_ASSIGN(const FetchOutcome outcome,
                       client->Fetch({.fetch_id = testing::FetchId()}, {}, 1, receive));
  EXPECT_EQ(outcome.completed.kv_bytes(), PartOf(spec_, kv_).size());
}

// ---- what may be cached

TEST_F(PrefixTest, RootIsOneThatTheRequestAllows) {
  expected_.cache_salt = "salt";
  EXPECT_OK(CheckPrefix(*manifest_, expected_));
  expected_.cache_salt = "mine";
  ExpectWrong("another salt");
  expected_.cache_salt.clear();
  manifest_->mutable_cache_root()->mutable_attention()->set_stride(16);
  EXPECT_OK(CheckPrefix(*manifest_, expected_));
  expected_.dense = true;
  ExpectWrong("sparse attention");
  expected_.dense = false;
  expected_.prefix_reuse = v1::PREFIX_REUSE_DENSE;
  ExpectWrong("sparse attention");
  expected_.prefix_reuse = v1::PREFIX_REUSE_NONE;
  ExpectWrong("no cached prefix");
  manifest_->clear_cache_root();
  EXPECT_OK(CheckPrefix(*manifest_, expected_));
}

TEST_F(PrefixTest, CachedTokensSayHowTheyWereComputed) {
  using Provenance = v1::AttentionProvenance;
  const auto cached = [](uint32_t tokens, Provenance::Algorithm algorithm) {
    return [=](v1::KvManifest& manifest) {
      manifest.set_cached_tokens(tokens);
      manifest.set_cached_algorithm(algorithm);
    };
  };
  EXPECT_OK(CheckFinal(cached(0, Provenance::ALGORITHM_UNSPECIFIED)));
  EXPECT_OK(CheckFinal(cached(20, Provenance::ALGORITHM_DENSE)));
  ExpectWrongEnd(cached(21, Provenance::ALGORITHM_DENSE), "cached_tokens=21 of num_tokens=21");
  ExpectWrongEnd(cached(20, Provenance::ALGORITHM_PROXY_ATTN), "cached_algorithm=2, expected 1");
  ExpectWrongEnd(cached(20, Provenance::ALGORITHM_UNSPECIFIED), "cached_algorithm=0, expected 1");
  ExpectWrongEnd(cached(0, Provenance::ALGORITHM_DENSE), "cached_algorithm=1, expected 0");
  ExpectWrongEnd(
      [&](v1::KvManifest& manifest) {
        cached(4, Provenance::ALGORITHM_DENSE)(manifest);
        manifest.clear_cache_root();
      },
      "cached_tokens=4 of num_tokens=21 without cache_root");
}

TEST_F(PrefixTest, PageHashesAreComputedAgain) {
  const auto named = [](std::string names) {
    return [=](v1::KvManifest& manifest) { manifest.set_page_hashes(names); };
  };
  EXPECT_OK(CheckFinal(named(names_)));
  EXPECT_OK(CheckFinal(named(Names(0, 3)))) << "a sparse prompt's last pieces have no names";
  EXPECT_OK(CheckFinal(named("")));
  ExpectWrongEnd(named(Names(1, 3)), "not the names of the prompt's pages");
  ExpectWrongEnd(named(names_.substr(0, 17)), "page_hashes has 17 bytes");
  ExpectWrongEnd(named(names_ + Names(0, 1)), "page_hashes has 96 bytes for 5 pages");
  ExpectWrongEnd([](v1::KvManifest& manifest) { manifest.clear_cache_root(); },
                 "page_hashes has 80 bytes");
  expected_.token_ids.clear();  // then nobody knows
  EXPECT_OK(CheckFinal(named(Names(1, 3))));
}

TEST_F(PrefixTest, TheEndIsCheckedInTheStream) {
  manifest_ = nullptr;
  EditCompleted(&stream_.back(), [this](v1::Completed& completed) {
    completed.mutable_manifest()->set_page_hashes(Names(1, 1));
  });
  KvReceiverOptions options;
  options.expected = expected_;
  KvAssembly assembly(options);
  KvReceiver receiver(StreamKind::kPrefill, &assembly);
  absl::Status status;
  for (const v1::PrefillResponse& response : stream_) {
    ASSERT_OK(status) << "only the end is wrong";
    grpc::ByteBuffer message = testing::ToByteBuffer(response.SerializeAsString(), 10000);
    status = receiver.OnMessage(message);
  }
  EXPECT_THAT(status, StatusIs(absl::StatusCode::kDataLoss, HasSubstr("page_hashes")));
}

}  // namespace
}  // namespace headstart

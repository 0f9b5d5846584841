// The prefix cache through the server: a hit changes nothing but the time, and what the manifest
// says of it is true.
#include <gtest/gtest.h>
#include <openssl/sha.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/server/fetching.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

constexpr size_t kNameBytes = 16;

// What came of a prompt.
struct Answer {
  v1::Accepted accepted;
  v1::KvManifest manifest;  // the first one
  v1::Completed completed;
  std::string kv;  // of the tokens that are not skipped: [layer][K, V][head][token][dim]

  uint32_t cached() const { return completed.manifest().cached_tokens(); }
  const std::string& names() const { return completed.manifest().page_hashes(); }
  std::string names(size_t first, size_t count) const {
    return names().substr(first * kNameBytes, count * kNameBytes);
  }
};

Answer AnswerOf(const CallResult& result) {
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  Answer answer;
  if (!result.status.ok()) return answer;
  answer.accepted = result.responses[0].accepted();
  answer.manifest = result.responses[1].manifest();
  answer.completed = CompletedOf(result.responses.back());
  answer.kv = ImageOf(result).bytes();
  return answer;
}

std::string Sha256Start(const std::string& bytes) {
  std::string hash(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(),
         reinterpret_cast<unsigned char*>(hash.data()));
  return hash.substr(0, kNameBytes);
}

// Names of the first pages, computed as prefill.proto says, byte by byte.
std::string NamesByTheDocument(const v1::PrefillRequest& request, const v1::KvManifest& manifest,
                               int pages) {
  std::string name = Sha256Start(std::string("headstart.v1.page") + '\0' + manifest.model_hash() +
                                 '\0' + manifest.cache_root().SerializeAsString());
  std::string names;
  for (int page = 0; page < pages; ++page) {
    std::string bytes = name;
    for (int i = 0; i < 128; ++i) {
      const uint32_t id = request.token_ids(page * 128 + i);
      for (int shift = 0; shift < 32; shift += 8) bytes += static_cast<char>(id >> shift);
    }
    name = Sha256Start(bytes);
    names += name;
  }
  return names;
}

v1::PrefillRequest Dense(int64_t count) {
  v1::PrefillRequest request = Prompt(count);
  request.mutable_attention()->set_preset(v1::ATTENTION_PRESET_EXACT);
  return request;
}

v1::PrefillRequest Sparse(int64_t count) {
  v1::PrefillRequest request = Prompt(count);
  request.mutable_attention()->set_preset(v1::ATTENTION_PRESET_FAST);
  request.mutable_attention()->set_dense_below_tokens(100);
  request.mutable_attention()->set_floor_tokens(0);
  return request;
}

v1::PrefillRequest With(v1::PrefillRequest request, v1::PrefixReuse reuse) {
  request.set_prefix_reuse(reuse);
  return request;
}

v1::PrefillRequest Salted(v1::PrefillRequest request, const std::string& salt) {
  request.set_cache_salt(salt);
  return request;
}

// Pages of 128 tokens, pieces of 256.
class PrefixCacheTest : public ServerTest {
 protected:
  PrefixCacheTest() { options_.piece_tokens = 256; }

  Answer Ask(const v1::PrefillRequest& request) { return AnswerOf(Run(request)); }
  // Computed anew from its first token on.
  Answer AskAnew(const v1::PrefillRequest& request) {
    return Ask(With(request, v1::PREFIX_REUSE_NONE));
  }

  void ExpectSame(const Answer& answer, const Answer& expected) {
    EXPECT_TRUE(answer.kv == expected.kv);
    EXPECT_EQ(answer.completed.first_token().id(), expected.completed.first_token().id());
    EXPECT_EQ(answer.completed.first_token().logprob(), expected.completed.first_token().logprob());
  }
  // The last bytes of what `whole` has of every layer, plane and head.
  void ExpectTail(const Answer& answer, const Answer& whole, int64_t skip) {
    const auto tokens = static_cast<size_t>(whole.manifest.num_tokens());
    const size_t row =
        whole.kv.size() / (size_t{2} * 2 * 2 * tokens);  // 2 layers, K and V, 2 heads
    std::string tail;
    for (size_t begin = 0; begin < whole.kv.size(); begin += tokens * row) {
      tail += whole.kv.substr(begin + static_cast<size_t>(skip) * row,
                              (tokens - static_cast<size_t>(skip)) * row);
    }
    EXPECT_TRUE(answer.kv == tail);
  }
};

// ---- hits

TEST_F(PrefixCacheTest, DenseHitChangesNothing) {
  Start();
  const Answer anew = AskAnew(Dense(700));
  const Answer first = Ask(Dense(700));
  EXPECT_EQ(first.cached(), 0u);
  const Answer hit = Ask(Dense(700));
  EXPECT_EQ(hit.accepted.cached_tokens(), 640u) << "five whole pages";
  EXPECT_EQ(hit.cached(), 640u);
  ExpectSame(first, anew);
  ExpectSame(hit, anew);
  EXPECT_EQ(hit.names(), first.names());
}

TEST_F(PrefixCacheTest, DenseHitEndsAtAnyPage) {
  Start();
  const Answer anew = AskAnew(Dense(1000));
  Ask(Dense(500));  // three whole pages: not where a piece ends
  const Answer hit = Ask(Dense(1000));
  EXPECT_EQ(hit.cached(), 384u);
  ExpectSame(hit, anew);
}

TEST_F(PrefixCacheTest, SparseHitChangesNothing) {
  Start();
  const Answer anew = AskAnew(Sparse(1000));
  EXPECT_EQ(anew.manifest.attention().algorithm(), v1::AttentionProvenance::ALGORITHM_PROXY_ATTN);
  const Answer first = Ask(Sparse(1000));
  EXPECT_EQ(first.cached(), 0u);
  ExpectSame(first, anew);
  const Answer hit = Ask(Sparse(1000));
  EXPECT_EQ(hit.cached(), 768u) << "whole pieces before the last one";
  ExpectSame(hit, anew);

  const Answer longer = AskAnew(Sparse(1300));
  const Answer extended = Ask(Sparse(1300));
  EXPECT_EQ(extended.cached(), 768u);
  ExpectSame(extended, longer);
}

TEST_F(PrefixCacheTest, TheLastPageIsAlwaysComputed) {
  Start();
  Ask(Dense(640));
  const Answer hit = Ask(Dense(640));
  EXPECT_EQ(hit.cached(), 512u);
  ExpectSame(hit, AskAnew(Dense(640)));
}

TEST_F(PrefixCacheTest, WhatWasEvictedIsComputedAgain) {
  options_.kv_pool_tokens = 1024;
  options_.max_prompt_tokens = 1024;
  Start();
  const Answer first = Ask(Dense(900));
  v1::PrefillRequest other = Dense(1000);
  other.set_token_ids(0, 99);
  Ask(other);  // wants all pages
  const Answer again = Ask(Dense(900));
  EXPECT_EQ(again.cached(), 0u);
  ExpectSame(again, first);
}

// ---- what the manifest says

TEST_F(PrefixCacheTest, ManifestSaysWhereADenseStartCameFrom) {
  Start();
  const v1::PrefillRequest request = Salted(Dense(700), "tenant");
  const Answer first = Ask(request);
  EXPECT_EQ(first.manifest.cache_root().salt(), "tenant");
  EXPECT_FALSE(first.manifest.cache_root().has_attention());
  EXPECT_EQ(first.manifest.cache_root().piece_tokens(), 0u) << "dense KV does not depend on it";
  EXPECT_EQ(first.manifest.skip_tokens(), 0u);
  EXPECT_TRUE(first.manifest.page_hashes().empty()) << "known in the end";
  EXPECT_EQ(first.completed.manifest().cached_algorithm(),
            v1::AttentionProvenance::ALGORITHM_UNSPECIFIED);
  EXPECT_EQ(first.names(), NamesByTheDocument(request, first.manifest, 5));
  const Answer hit = Ask(request);
  EXPECT_EQ(hit.completed.manifest().cached_algorithm(), v1::AttentionProvenance::ALGORITHM_DENSE);
}

TEST_F(PrefixCacheTest, ManifestSaysWhereASparseStartCameFrom) {
  options_.attention.dense_above_density = 0.75f;
  Start();
  const Answer first = Ask(Sparse(1000));
  const v1::CacheRoot& root = first.manifest.cache_root();
  EXPECT_EQ(root.salt(), "");
  EXPECT_EQ(root.piece_tokens(), 256u);
  EXPECT_EQ(root.dense_above_density(), 0.75f);
  v1::AttentionOptions attention = first.manifest.attention().options();
  attention.clear_preset();
  EXPECT_EQ(root.attention().SerializeAsString(), attention.SerializeAsString());
  EXPECT_EQ(first.names(), NamesByTheDocument(Sparse(1000), first.manifest, 6))
      << "the last piece's pages have no name";
  const Answer hit = Ask(Sparse(1000));
  EXPECT_EQ(hit.completed.manifest().cached_algorithm(),
            v1::AttentionProvenance::ALGORITHM_PROXY_ATTN);
  EXPECT_EQ(hit.names(), first.names());
}

TEST_F(PrefixCacheTest, WithoutSaltADenseRootIsEmptyButThere) {
  Start();
  const Answer first = Ask(Dense(300));
  EXPECT_TRUE(first.manifest.has_cache_root());
  EXPECT_EQ(first.manifest.cache_root().ByteSizeLong(), 0u);
  EXPECT_EQ(first.names(), NamesByTheDocument(Dense(300), first.manifest, 2));
  EXPECT_EQ(Ask(Dense(300)).cached(), 256u);
}

// ---- who shares

TEST_F(PrefixCacheTest, SaltsDoNotShare) {
  Start();
  const Answer first = Ask(Salted(Dense(700), "a"));
  for (const char* other : {"b", ""}) {
    const Answer stranger = Ask(Salted(Dense(700), other));
    EXPECT_EQ(stranger.accepted.cached_tokens(), 0u);
    EXPECT_EQ(stranger.cached(), 0u);
    EXPECT_NE(stranger.names(0, 1), first.names(0, 1));
    ExpectSame(stranger, first);
  }
  EXPECT_EQ(Ask(Salted(Dense(700), "a")).cached(), 640u);
}

TEST_F(PrefixCacheTest, SparseAndDensePagesAreNotMixed) {
  Start();
  Ask(Dense(1000));
  EXPECT_EQ(Ask(Sparse(1000)).cached(), 0u);
  v1::PrefillRequest other = Sparse(1000);
  other.mutable_attention()->set_gamma(0.5f);
  EXPECT_EQ(Ask(other).cached(), 0u) << "another attention";
  EXPECT_EQ(Ask(Dense(1000)).cached(), 896u);
}

TEST_F(PrefixCacheTest, DensePagesMayStandForASparsePromptsStart) {
  Start();
  Ask(Dense(500));
  const v1::PrefillRequest request = With(Sparse(1000), v1::PREFIX_REUSE_DENSE);
  const Answer hit = Ask(request);
  EXPECT_EQ(hit.cached(), 384u);
  EXPECT_EQ(hit.manifest.attention().algorithm(), v1::AttentionProvenance::ALGORITHM_PROXY_ATTN);
  EXPECT_EQ(hit.completed.manifest().cached_algorithm(), v1::AttentionProvenance::ALGORITHM_DENSE);
  EXPECT_FALSE(hit.manifest.cache_root().has_attention());
  EXPECT_EQ(hit.names(), NamesByTheDocument(request, hit.manifest, 3)) << "of the dense ones only";
  EXPECT_EQ(Ask(Dense(1000)).cached(), 384u) << "its sparse pages are nobody's";
  EXPECT_EQ(Ask(Sparse(1000)).cached(), 0u);
}

TEST_F(PrefixCacheTest, NoneNeitherFindsNorLeavesPages) {
  Start();
  const Answer none = AskAnew(Dense(700));
  EXPECT_FALSE(none.manifest.has_cache_root());
  EXPECT_TRUE(none.names().empty());
  EXPECT_EQ(Ask(Dense(700)).cached(), 0u);
  EXPECT_EQ(AskAnew(Dense(700)).cached(), 0u);
}

TEST_F(PrefixCacheTest, CanBeSwitchedOff) {
  options_.prefix_cache = false;
  Start();
  for (int i = 0; i < 2; ++i) {
    v1::PrefillRequest request = Dense(700);
    request.set_held_pages(std::string(kNameBytes, 'x'));
    const Answer answer = Ask(request);
    EXPECT_EQ(answer.cached(), 0u);
    EXPECT_EQ(answer.manifest.skip_tokens(), 0u);
    EXPECT_FALSE(answer.manifest.has_cache_root());
    EXPECT_TRUE(answer.names().empty());
  }
  grpc::ClientContext context;
  v1::GetServerInfoResponse info;
  ASSERT_TRUE(NewStub()->GetServerInfo(&context, {}, &info).ok());
  EXPECT_FALSE(info.prefix_cache());
}

// ---- shared while it is computed

TEST_F(PrefixCacheTest, PrefixThatIsBeingComputedIsWaitedFor) {
  Start();
  const Answer anew = AskAnew(Dense(240)), longer = AskAnew(Dense(250));
  const int64_t embedded = backend_->CountCalls("Embed");
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  OpenCall first(stub.get(), Dense(240));
  barrier.WaitUntilReached();
  OpenCall second(stub.get(), Dense(250));
  WaitForQueued(1);
  barrier.Open();
  const Answer of_first = AnswerOf(first.Finish()), of_second = AnswerOf(second.Finish());
  EXPECT_EQ(of_first.cached(), 0u);
  EXPECT_EQ(of_second.accepted.cached_tokens(), 0u) << "not there yet when it came";
  EXPECT_EQ(of_second.cached(), 128u);
  EXPECT_EQ(backend_->CountCalls("Embed"), embedded + 2);
  ExpectSame(of_first, anew);
  ExpectSame(of_second, longer);
}

TEST_F(PrefixCacheTest, OneOfTwoThatWaitComputesTheirPrefix) {
  Start();
  Barrier barrier(backend_, "Attention", 0);
  const auto stub = NewStub();
  v1::PrefillRequest urgent = Dense(10);
  urgent.set_priority(100);
  OpenCall running(stub.get(), urgent);
  barrier.WaitUntilReached();
  OpenCall one(stub.get(), Dense(700)), other(stub.get(), Dense(700));
  WaitForQueued(2);
  barrier.Open();
  EXPECT_TRUE(running.Finish().status.ok());
  const Answer of_one = AnswerOf(one.Finish()), of_other = AnswerOf(other.Finish());
  EXPECT_EQ(std::min(of_one.cached(), of_other.cached()), 0u);
  EXPECT_EQ(std::max(of_one.cached(), of_other.cached()), 640u);
  ExpectSame(of_one, of_other);
}

// ---- pages that the client holds

TEST_F(PrefixCacheTest, OnlyWhatTheClientLacksIsSent) {
  Start();
  const Answer whole = Ask(Dense(700));
  const struct {
    std::string held;
    uint32_t skip_tokens, expected;
  } cases[] = {{whole.names(), 0, 640},
               {whole.names(3, 2) + whole.names(0, 2), 0, 256},  // the third is missing
               {whole.names(1, 4), 0, 0},
               {whole.names(0, 1), 200, 200},
               {std::string(kNameBytes, 'x'), 0, 0}};
  for (const auto& [held, skip_tokens, expected] : cases) {
    v1::PrefillRequest request = Dense(700);
    request.set_held_pages(held);
    request.set_skip_tokens(skip_tokens);
    const Answer answer = Ask(request);
    EXPECT_EQ(answer.manifest.skip_tokens(), expected);
    EXPECT_EQ(answer.completed.kv_bytes(), (700 - expected) * 1024);
    ExpectTail(answer, whole, expected);
    EXPECT_EQ(answer.completed.first_token().id(), whole.completed.first_token().id());
  }
}

TEST_F(PrefixCacheTest, TheLastTokensPageIsAlwaysSent) {
  Start();
  const Answer whole = Ask(Dense(640));
  v1::PrefillRequest request = Dense(640);
  request.set_held_pages(whole.names());
  EXPECT_EQ(Ask(request).manifest.skip_tokens(), 512u);
}

TEST_F(PrefixCacheTest, HeldPagesNeedNotBeInTheCache) {
  Start();
  const v1::PrefillRequest salted = Salted(Dense(700), "a");
  const std::string names = NamesByTheDocument(salted, Ask(Salted(Dense(300), "a")).manifest,
                                               5);  // of a prompt that nobody has asked yet
  v1::PrefillRequest request = salted;
  request.set_held_pages(names);
  const Answer answer = Ask(request);
  EXPECT_EQ(answer.cached(), 256u);
  EXPECT_EQ(answer.manifest.skip_tokens(), 640u);
  ExpectTail(answer, AskAnew(Dense(700)), 640);
}

TEST_F(PrefixCacheTest, HeldSparsePagesAreNotSent) {
  Start();
  const Answer whole = Ask(Sparse(1000));
  v1::PrefillRequest request = Sparse(1000);
  request.set_held_pages(whole.names());
  const Answer answer = Ask(request);
  EXPECT_EQ(answer.manifest.skip_tokens(), 768u);
  ExpectTail(answer, whole, 768);
}

TEST_F(PrefixCacheTest, FetchesBeginBehindHeldPages) {
  Start();
  const Answer whole = Ask(Dense(700));
  v1::PrefillRequest request = Dense(700);
  request.set_held_pages(whole.names(0, 3));
  request.mutable_detached()->add_readers();
  const auto stub = NewStub();
  OpenCall prefill(stub.get(), request);
  const std::string fetch_id = prefill.Read().accepted().fetch_id();
  const CallResult fetched = OpenFetch(stub.get(), fetch_id, {}).Finish();
  ASSERT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  const v1::KvManifest& manifest = fetched.responses.front().manifest();
  EXPECT_EQ(manifest.skip_tokens(), 384u);
  EXPECT_TRUE(prefill.Finish().status.ok());
  Answer answer;
  answer.kv = ImageOf(fetched).bytes();
  ExpectTail(answer, whole, 384);
  grpc::ClientContext context;
  v1::ReleaseKvRequest release;
  release.set_fetch_id(fetch_id);
  v1::ReleaseKvResponse released;
  EXPECT_TRUE(stub->ReleaseKv(&context, release, &released).ok());
}

}  // namespace
}  // namespace headstart::testing

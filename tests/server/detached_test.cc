// Detached KV: whatever way it is fetched, together it is what Prefill ships on its own stream.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/server/fetching.h"
#include "tests/testing/status_matchers.h"

namespace headstart::testing {
namespace {

// A chunk of 128 tokens for each of the four layers, piece after piece.
class DetachedTest : public ServerTest {
 protected:
  DetachedTest() {
    model_.num_layers = 4;
    options_.piece_tokens = 128;
    options_.host_kv_bytes = 64 << 20;  // a chunk has 1 MiB at hand and holds 64 KiB
  }

  // The KV that Prefill ships. Nothing of it stays in the cache.
  std::string Attached(v1::PrefillRequest request) {
    request.clear_detached();
    request.set_prefix_reuse(v1::PREFIX_REUSE_NONE);
    return ImageOf(Run(request)).bytes();
  }

  KvImage NewImage(const v1::PrefillRequest& request) {
    v1::KvManifest manifest;
    manifest.set_num_tokens(static_cast<uint32_t>(request.token_ids_size()));
    manifest.mutable_layout()->set_num_layers(static_cast<uint32_t>(model_.num_layers));
    manifest.mutable_layout()->set_num_kv_heads(static_cast<uint32_t>(model_.num_kv_heads));
    manifest.mutable_layout()->set_head_dim(static_cast<uint32_t>(model_.head_dim));
    return KvImage(manifest, request.skip_tokens());
  }

  // Runs the prompt to its end and names its KV.
  std::string Compute(const v1::PrefillRequest& request) {
    const CallResult result = Run(request);
    EXPECT_TRUE(result.status.ok()) << result.status.error_message();
    return result.responses.empty() ? "" : result.responses[0].accepted().fetch_id();
  }

  void Release(const std::string& fetch_id) {
    grpc::ClientContext context;
    v1::ReleaseKvRequest request;
    request.set_fetch_id(fetch_id);
    v1::ReleaseKvResponse response;
    EXPECT_TRUE(NewStub()->ReleaseKv(&context, request, &response).ok());
  }

  // All parts, each on a connection of its own and acknowledged as it comes, are the attached KV.
  void ExpectPartsAreWhole(const v1::PrefillRequest& request,
                           const std::vector<v1::KvPart>& parts) {
    const std::string expected = Attached(request);
    const std::string fetch_id = Compute(request);
    KvImage image = NewImage(request);
    for (const v1::KvPart& part : parts) {
      const auto stub = NewStub();
      const CallResult fetched = OpenFetch(stub.get(), fetch_id, part).Finish(&image);
      EXPECT_TRUE(fetched.status.ok()) << fetched.status.error_message();
    }
    EXPECT_TRUE(image.complete());
    EXPECT_TRUE(image.bytes() == expected);
    Release(fetch_id);
  }
};

TEST_F(DetachedTest, PrefillCarriesEverythingButTheKv) {
  options_.fetch_address = "10.1.2.3:8443";
  Start();
  v1::PrefillRequest request = DetachedPrompt(300);
  request.mutable_detached()->mutable_lease()->set_seconds(3600);
  const CallResult result = Run(request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  ASSERT_EQ(result.responses.size(), 3u);
  const v1::Accepted& accepted = result.responses[0].accepted();
  EXPECT_EQ(accepted.fetch_id().size(), 16u);
  EXPECT_EQ(accepted.fetch_address(), "10.1.2.3:8443");
  EXPECT_EQ(accepted.lease().seconds(), 600) << "cut to the longest";
  EXPECT_EQ(result.responses[1].manifest().num_tokens(), 300u);
  const v1::Completed completed = CompletedOf(result.responses[2]);
  EXPECT_EQ(completed.num_chunks(), 0u);
  EXPECT_EQ(completed.kv_bytes(), 0u);
  EXPECT_EQ(completed.manifest().layer_density_size(), model_.num_layers);

  const auto stub = NewStub();
  const CallResult fetched = OpenFetch(stub.get(), accepted.fetch_id(), {}).Finish();
  ASSERT_TRUE(fetched.status.ok()) << fetched.status.error_message();
  EXPECT_EQ(fetched.responses.front().manifest().token_hash(),
            result.responses[1].manifest().token_hash());
  const v1::Completed of_fetch = CompletedOf(fetched.responses.back());
  EXPECT_EQ(of_fetch.num_chunks(), fetched.responses.size() - 2);
  EXPECT_EQ(of_fetch.kv_bytes(), 300u * 2048u);
  EXPECT_EQ(of_fetch.first_token().id(), completed.first_token().id());
  Release(accepted.fetch_id());
}

TEST_F(DetachedTest, AttachedKvHasNothingToFetch) {
  Start();
  const v1::Accepted accepted = Run(Prompt(5)).responses.front().accepted();
  EXPECT_EQ(accepted.fetch_id(), "");
  EXPECT_FALSE(accepted.has_lease());
}

TEST_F(DetachedTest, FetchBeforeWhileAndAfterComputeBringsTheSame) {
  Start();
  const v1::PrefillRequest request = DetachedPrompt(500);
  const std::string expected = Attached(request);
  const auto stub = NewStub();
  v1::PrefillRequest before = Prompt(10);
  before.set_priority(100);
  Barrier in_first(backend_, "Attention", 2);
  OpenCall first(stub.get(), before);
  in_first.WaitUntilReached();
  OpenCall prefill(stub.get(), request);  // waits behind the first
  const std::string fetch_id = prefill.Read().accepted().fetch_id();
  KvImage early_image = NewImage(request), late_image = NewImage(request),
          image = NewImage(request);
  OpenFetch early(stub.get(), fetch_id, {});
  Barrier in_prefill(backend_, "Attention", 2);  // the first one is in that layer already
  in_first.Open();
  EXPECT_TRUE(first.Finish().status.ok());
  in_prefill.WaitUntilReached();
  OpenFetch meanwhile(stub.get(), fetch_id, {});
  meanwhile.ReadChunks(1, &image);  // although compute stands still
  early.ReadChunks(1, &early_image);
  in_prefill.Open();
  EXPECT_TRUE(early.Finish(&early_image).status.ok());
  EXPECT_TRUE(meanwhile.Finish(&image).status.ok());
  EXPECT_TRUE(prefill.Finish().status.ok());

  OpenFetch late(stub.get(), fetch_id, {});
  EXPECT_TRUE(late.Finish(&late_image).status.ok());
  for (const KvImage* each : {&early_image, &image, &late_image}) {
    EXPECT_TRUE(each->bytes() == expected);
  }
  Release(fetch_id);
}

TEST_F(DetachedTest, StripesAreTheWhole) {
  Start();
  for (const uint32_t count : {1u, 2u, 3u, 8u}) {
    SCOPED_TRACE(count);
    ExpectPartsAreWhole(DetachedPrompt(700), Stripes(count));
  }
  EXPECT_GT(Metric("headstart_kv_bytes_sent_total{model=\"tiny\",stripes=\"2-4\"}"), 0);
  EXPECT_GT(Metric("headstart_kv_bytes_sent_total{model=\"tiny\",stripes=\"5-8\"}"), 0);
}

TEST_F(DetachedTest, RangesOfHeadsAndLayersAreTheWhole) {
  Start();
  std::vector<v1::KvPart> parts(4);
  for (uint32_t i = 0; i < 4; ++i) {  // two ranks of two pipeline stages
    parts[i].set_kv_head_begin(i % 2);
    parts[i].set_kv_head_count(1);
    parts[i].set_layer_begin(i / 2 * 3);
    parts[i].set_layer_count(i / 2 == 0 ? 3 : 1);
  }
  ExpectPartsAreWhole(DetachedPrompt(517), parts);
}

TEST_F(DetachedTest, SkippedTokensAreNotSent) {
  Start();
  for (const uint32_t skip : {1u, 128u, 200u, 516u}) {
    SCOPED_TRACE(skip);
    v1::PrefillRequest request = DetachedPrompt(517);
    request.set_skip_tokens(skip);
    ExpectPartsAreWhole(request, Stripes(2));
  }
}

TEST_F(DetachedTest, LongPromptShipsThroughLittleHostMemory) {
  options_.host_kv_bytes = 8 << 20;  // two pieces
  Start();
  const v1::PrefillRequest request = DetachedPrompt(1500, Stripes(2));
  const std::string expected = Attached(request);
  const auto stub = NewStub();
  OpenCall prefill(stub.get(), request);
  const std::string fetch_id = prefill.Read().accepted().fetch_id();
  std::vector<KvImage> images(2, NewImage(request));
  std::vector<std::thread> readers;
  for (uint32_t i = 0; i < 2; ++i) {
    readers.emplace_back([&, i] {
      const auto own = NewStub();
      OpenFetch fetch(own.get(), fetch_id, Stripe(i, 2));
      v1::PrefillResponse response;
      while (fetch.Read(&response) && !response.has_completed()) {
        if (!response.has_chunk()) continue;
        images[i].Place(response.chunk());
        fetch.Acknowledge(fetch.num_chunks());
      }
      EXPECT_TRUE(fetch.Finish().status.ok());
    });
  }
  for (std::thread& reader : readers) reader.join();
  EXPECT_TRUE(prefill.Finish().status.ok());
  std::string both = images[0].bytes();
  for (size_t i = 0; i < both.size(); ++i)
    both[i] |= images[1].bytes()[i];  // zeros where nothing came
  EXPECT_TRUE(both == expected);
  Release(fetch_id);
}

TEST_F(DetachedTest, TheSameIdCanBeFetchedTwice) {
  Start();
  const v1::PrefillRequest request = DetachedPrompt(300);
  const std::string expected = Attached(request);
  const std::string fetch_id = Compute(request);
  const auto stub = NewStub();
  OpenFetch first(stub.get(), fetch_id, {}), second(stub.get(), fetch_id, {});
  KvImage first_image = NewImage(request), second_image = NewImage(request);
  EXPECT_TRUE(second.Finish(&second_image).status.ok());
  EXPECT_TRUE(first.Finish(&first_image).status.ok());
  EXPECT_TRUE(first_image.bytes() == expected);
  EXPECT_TRUE(second_image.bytes() == expected);
  Release(fetch_id);
}

// ---- resume

TEST_F(DetachedTest, BrokenFetchGoesOnWithoutComputingAgain) {
  Start();
  const v1::PrefillRequest request = DetachedPrompt(1500);
  const std::string expected = Attached(request);
  const std::string fetch_id = Compute(request);
  const int64_t computed = backend_->CountCalls("Attention");
  KvImage image = NewImage(request);
  constexpr uint32_t kThird = 14;  // of 48 chunks
  {
    const auto stub = NewStub();
    OpenFetch broken(stub.get(), fetch_id, {});
    broken.ReadChunks(kThird, &image);
    broken.context().TryCancel();
    EXPECT_EQ(broken.Finish().status.error_code(), grpc::StatusCode::CANCELLED);
  }
  const auto stub = NewStub();
  const CallResult rest = OpenFetch(stub.get(), fetch_id, {}, kThird).Finish(&image);
  ASSERT_TRUE(rest.status.ok()) << rest.status.error_message();
  EXPECT_TRUE(image.bytes() == expected);
  EXPECT_EQ(CompletedOf(rest.responses.back()).num_chunks(), 48u) << "those before included";
  EXPECT_EQ(CompletedOf(rest.responses.back()).kv_bytes(), 1500u * 2048u);
  EXPECT_EQ(backend_->CountCalls("Attention"), computed);
  EXPECT_EQ(Metric("headstart_kv_resumes_total{model=\"tiny\"}"), 1);
  Release(fetch_id);
}

TEST_F(DetachedTest, AnnouncedFetchResumesBehindWhatItAcknowledged) {
  Start();
  const v1::PrefillRequest request = DetachedPrompt(1000, {Stripe(0, 1)});
  const std::string expected = Attached(request);
  Barrier barrier(backend_, "Attention", 0, /*passes=*/7);  // before the last of eight pieces
  const auto stub = NewStub();
  OpenCall prefill(stub.get(), request);
  const std::string fetch_id = prefill.Read().accepted().fetch_id();
  KvImage image = NewImage(request);
  {
    const auto own = NewStub();
    OpenFetch broken(own.get(), fetch_id, Stripe(0, 1));
    broken.ReadChunks(10, &image);
    barrier.WaitUntilReached();
    broken.Acknowledge(8);
    EXPECT_TRUE(ComesTrue([this] {
      const MetricsSnapshot now = server_->Snapshot();
      return now.host_kv_bytes - now.host_kv_free_bytes == 24 << 20;  // 32 chunks less 8
    }));
    broken.context().TryCancel();
    broken.Finish();
  }
  const CallResult gone = OpenFetch(stub.get(), fetch_id, Stripe(0, 1), 7).Finish();
  EXPECT_EQ(gone.status.error_code(), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_EQ(gone.reason(), "KV_GONE");
  OpenFetch rest(stub.get(), fetch_id, Stripe(0, 1), 10);
  barrier.Open();
  EXPECT_TRUE(rest.Finish(&image).status.ok());
  EXPECT_TRUE(prefill.Finish().status.ok());
  EXPECT_TRUE(image.bytes() == expected);
  Release(fetch_id);
}

TEST_F(DetachedTest, ChunksThatWereNotMadeCanNotBeHeldAlready) {
  Start();
  const std::string fetch_id = Compute(DetachedPrompt(10));
  const auto stub = NewStub();
  const CallResult beyond = OpenFetch(stub.get(), fetch_id, {}, 5).Finish();
  EXPECT_EQ(beyond.status.error_code(), grpc::StatusCode::OUT_OF_RANGE);
  EXPECT_EQ(beyond.reason(), "KV_GONE");
  Release(fetch_id);
}

}  // namespace
}  // namespace headstart::testing

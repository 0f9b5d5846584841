/* The client library behind a C ABI, for other languages. Made for client/python, which loads it
 * with ctypes.
 *
 * Strings end with 0, in UTF-8; null is the empty one. Messages are serialised protos of
 * headstart.v1. What is passed in is only read during the call. Functions are thread-safe, and
 * block; no lock of a caller's language should be held meanwhile. */
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define HEADSTART_EXPORT __attribute__((visibility("default")))
#else
#define HEADSTART_EXPORT
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Grows with every change of this file that a caller must know of. */
#define HEADSTART_ABI_VERSION 3
HEADSTART_EXPORT int32_t headstart_abi_version(void);

typedef struct HeadstartClient HeadstartClient;
typedef struct HeadstartCancel HeadstartCancel;

typedef struct {
  const uint8_t* data;
  size_t size;
} HeadstartBytes;

/* What a call ended with. Never null; belongs to the caller until headstart_reply_free. */
typedef struct {
  HeadstartBytes status;    /* google.rpc.Status; empty: OK */
  HeadstartBytes accepted;  /* Accepted */
  HeadstartBytes completed; /* Completed; num_chunks and kv_bytes of all streams */
  /* Seconds since the last attempt began. */
  double accepted_s, manifest_s, first_chunk_s, last_chunk_s, completed_s;
  int32_t attempts;
  int32_t connections; /* that the KV came on */
  int32_t resumes;     /* streams that broke and went on */
} HeadstartReply;
HEADSTART_EXPORT void headstart_reply_free(HeadstartReply* reply);

/* See PrefillClientOptions in client/client_options.h. */
typedef struct {
  const char* target;
  int32_t tls; /* 0: plain text, and the four names are not looked at */
  const char* ca_file;
  const char* cert_file;
  const char* key_file;
  const char* server_name;
  int32_t max_attempts;
  int32_t connections;
  const char* allowed_fetch_hosts; /* with commas between them */
} HeadstartClientOptions;

/* *client is set when the reply's status is OK. */
HEADSTART_EXPORT HeadstartReply* headstart_client_new(const HeadstartClientOptions* options,
                                                      HeadstartClient** client);
/* No call may be under way. */
HEADSTART_EXPORT void headstart_client_free(HeadstartClient* client);

HEADSTART_EXPORT HeadstartCancel* headstart_cancel_new(void);
/* Ends calls that were, are or will be given it. From any thread. */
HEADSTART_EXPORT void headstart_cancel(HeadstartCancel* cancel);
HEADSTART_EXPORT void headstart_cancel_free(HeadstartCancel* cancel);

/* The KV that comes; see KvShape in client/kv_destination.h. */
typedef struct {
  int64_t num_layers;
  int64_t num_kv_heads;
  int64_t num_tokens;
  int64_t head_dim;
  int64_t element_bytes;
  int64_t token_begin;
  int64_t block_tokens;
} HeadstartKvShape;

/* Where it goes; see KvDestination in client/kv_destination.h. The arrays are read before
 * on_manifest's caller goes on; the memory that `planes` point to is written until the call
 * returns. */
typedef struct {
  void* const* planes; /* K of the first layer, V of the first layer, K of the second, ... */
  int64_t num_planes;
  int64_t plane_bytes;
  const int32_t* page_table;
  int64_t num_pages;
  int64_t page_tokens;
  int64_t page_stride;
  int64_t head_stride;
  int64_t token_stride;
  int64_t token_begin;
  int32_t values; /* 0: as sent; fp8 multiplied out: 1 bf16, 2 f32 */
  float* scales;  /* of fp8 as sent; else null */
  int64_t num_scales;
  uint8_t* arrived; /* [layers][pages on the wire], set to 1 as they come; or null */
  int64_t num_arrived;
} HeadstartKvDestination;

/* Called on the threads that receive, never two at a time. Anything but 0 ends the call with
 * ABORTED. They must not use the client that calls them. on_accepted and on_layer may be null. */
typedef struct {
  void* context;
  int32_t (*on_accepted)(void* context, HeadstartBytes accepted);
  /* Fills in where the KV of this shape goes. */
  int32_t (*on_manifest)(void* context, HeadstartBytes manifest, const HeadstartKvShape* shape,
                         HeadstartKvDestination* destination);
  /* All of the model's layer has come. */
  int32_t (*on_layer)(void* context, int64_t layer);
} HeadstartCallbacks;

/* PrefillClient::Prefill. timeout_s is that of the call with its retries, and positive. `cancel`
 * may be null. Of a request with `detached` no KV comes, and on_manifest is not called.
 */
HEADSTART_EXPORT HeadstartReply* headstart_prefill(HeadstartClient* client, HeadstartBytes request,
                                                   double timeout_s,
                                                   const HeadstartCallbacks* callbacks,
                                                   HeadstartCancel* cancel);

typedef struct {
  HeadstartBytes fetch_id;
  const char* fetch_address;
  HeadstartBytes part; /* KvPart */
  int32_t num_stripes;
  /* Of the request, as are held_pages, which want its token ids: uint32, little-endian. */
  int64_t skip_tokens;
  HeadstartBytes held_pages;
  HeadstartBytes token_ids;
} HeadstartFetch;

/* PrefillClient::Fetch. timeout_s and `cancel` as above. */
HEADSTART_EXPORT HeadstartReply* headstart_fetch(HeadstartClient* client,
                                                 const HeadstartFetch* fetch, double timeout_s,
                                                 const HeadstartCallbacks* callbacks,
                                                 HeadstartCancel* cancel);

#ifdef __cplusplus
} /* extern "C" */
#endif

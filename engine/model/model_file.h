// Opens the files of a model directory, which are not trusted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace headstart {

// A model directory. Symbolic links in it are followed only to targets inside it, or inside the
// Hugging Face cache entry (models--…/) that it is a snapshot of.
class ModelDir {
 public:
  // INVALID_ARGUMENT: not a folder that can be read.
  static absl::StatusOr<ModelDir> Open(const std::string& path);

  // DIR/name, for messages.
  std::string PathOf(absl::string_view name) const;
  bool Contains(absl::string_view name) const;
  // The file's real path: a regular file that may be followed to.
  absl::StatusOr<std::string> Resolve(absl::string_view name) const;
  // The whole content of a file of at most `max_bytes`.
  absl::StatusOr<std::string> ReadText(absl::string_view name, int64_t max_bytes) const;

 private:
  ModelDir(std::string path, std::string root) : path_(std::move(path)), root_(std::move(root)) {}

  std::string path_;  // as the user named it
  std::string root_;  // real path that targets must lie in
};

// A file mapped read-only. A file that somebody shortens while it is mapped ends the process on the
// next access; models must not be changed while they load.
class MappedFile {
 public:
  // `path`: a resolved path; `name`: for messages. INVALID_ARGUMENT when it is empty, no regular
  // file, or can't be mapped.
  static absl::StatusOr<MappedFile> Open(const std::string& path, absl::string_view name);

  MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
  MappedFile& operator=(MappedFile&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~MappedFile();

  absl::Span<const std::byte> bytes() const {
    return {static_cast<const std::byte*>(data_), static_cast<size_t>(bytes_)};
  }

 private:
  MappedFile(void* data, int64_t bytes) : data_(data), bytes_(bytes) {}

  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace headstart

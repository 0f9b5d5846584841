// Opens the files of a model directory, which are not trusted.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace headstart {

// Which symbolic links in a model directory are followed: those to targets inside it, or inside the
// Hugging Face cache entry (models--…/) that it is a snapshot of; or all.
enum class Links : uint8_t { kInside, kAnywhere };

class ModelDir {
 public:
  // INVALID_ARGUMENT: not a folder that can be read.
  static absl::StatusOr<ModelDir> Open(const std::string& path, Links links = Links::kInside);

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
  std::string root_;  // real path that targets must lie in; empty: anywhere
};

// A file that is read by position, from any thread. What it says may change or go away at any time:
// that is an error of Read, where a mapping would end the process.
class ModelFile {
 public:
  // `path`: a resolved path; `name`: for messages. INVALID_ARGUMENT when it is empty, no regular
  // file, can't be read, or is a Git LFS pointer instead of the file.
  static absl::StatusOr<ModelFile> Open(const std::string& path, std::string name);

  ModelFile(ModelFile&& other) noexcept { *this = std::move(other); }
  ModelFile& operator=(ModelFile&& other) noexcept {
    std::swap(fd_, other.fd_);
    std::swap(bytes_, other.bytes_);
    std::swap(name_, other.name_);
    return *this;
  }
  ~ModelFile();

  const std::string& name() const { return name_; }
  int64_t bytes() const { return bytes_; }  // when it was opened
  // Fills `into` from `offset` on. INVALID_ARGUMENT names the file: shorter than that by now, or
  // what the system says.
  absl::Status Read(int64_t offset, absl::Span<std::byte> into) const;

 private:
  ModelFile(int fd, int64_t bytes, std::string name)
      : fd_(fd), bytes_(bytes), name_(std::move(name)) {}
  absl::Status CheckNoPointer() const;

  int fd_ = -1;
  int64_t bytes_ = 0;
  std::string name_;
};

}  // namespace headstart

#include "engine/model/model_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/base/status_macros.h"

namespace headstart {
namespace {

namespace fs = std::filesystem;

absl::Status CantRead(absl::string_view name, int error) {
  return absl::InvalidArgumentError(
      absl::StrCat(name, ": can't be read: ", std::generic_category().message(error)));
}

// An open descriptor of a regular file and its size. Never waits, not even on a pipe.
struct OpenFile {
  int fd = -1;
  int64_t bytes = 0;
};

absl::StatusOr<OpenFile> OpenRegular(const std::string& path, absl::string_view name) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
  if (fd < 0) return CantRead(name, errno);
  struct stat info;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(name, ": not a regular file"));
  }
  return OpenFile{fd, static_cast<int64_t>(info.st_size)};
}

bool IsInside(const fs::path& path, const fs::path& root) {
  const auto [root_end, unused] = std::mismatch(root.begin(), root.end(), path.begin(), path.end());
  return root_end == root.end();
}

}  // namespace

absl::StatusOr<ModelDir> ModelDir::Open(const std::string& path) {
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.message()));
  if (!fs::is_directory(real, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a folder"));
  }
  // …/models--org--name/snapshots/<commit>: files are links to ../../blobs/.
  const fs::path entry = real.parent_path().parent_path();
  const bool is_snapshot = real.parent_path().filename() == "snapshots" &&
                           absl::StartsWith(entry.filename().string(), "models--");
  return ModelDir(path, is_snapshot ? entry.string() : real.string());
}

std::string ModelDir::PathOf(absl::string_view name) const {
  return absl::StrCat(path_, absl::EndsWith(path_, "/") ? "" : "/", name);
}

bool ModelDir::Contains(absl::string_view name) const {
  std::error_code ignored;
  return fs::exists(fs::symlink_status(PathOf(name), ignored));
}

absl::StatusOr<std::string> ModelDir::Resolve(absl::string_view name) const {
  const std::string path = PathOf(name);
  std::error_code error;
  const fs::path real = fs::canonical(path, error);
  if (error) return absl::InvalidArgumentError(absl::StrCat(path, ": ", error.message()));
  if (!IsInside(real, root_)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": is a link to ", real.string(), ", outside of ", root_));
  }
  return real.string();
}

absl::StatusOr<std::string> ModelDir::ReadText(absl::string_view name, int64_t max_bytes) const {
  const std::string path = PathOf(name);
  HEADSTART_ASSIGN_OR_RETURN(const std::string real, Resolve(name));
  HEADSTART_ASSIGN_OR_RETURN(const OpenFile file, OpenRegular(real, path));
  const absl::Cleanup close_file = [fd = file.fd] { close(fd); };
  if (file.bytes > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", file.bytes, " bytes, limit ", max_bytes));
  }
  std::string text(static_cast<size_t>(file.bytes), '\0');
  size_t done = 0;
  while (done < text.size()) {
    const ssize_t got = read(file.fd, text.data() + done, text.size() - done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return CantRead(path, got < 0 ? errno : EIO);
    done += static_cast<size_t>(got);
  }
  return text;
}

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path, absl::string_view name) {
  HEADSTART_ASSIGN_OR_RETURN(const OpenFile file, OpenRegular(path, name));
  const absl::Cleanup close_file = [fd = file.fd] { close(fd); };
  if (file.bytes == 0) return absl::InvalidArgumentError(absl::StrCat(name, ": empty file"));
  void* data =
      mmap(nullptr, static_cast<size_t>(file.bytes), PROT_READ, MAP_PRIVATE, file.fd, /*offset=*/0);
  if (data == MAP_FAILED) return CantRead(name, errno);
  return MappedFile(data, file.bytes);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
}

}  // namespace headstart

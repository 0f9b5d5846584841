#include "kernels/base/machine.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <sys/resource.h>

#include <filesystem>
#include <string>

#include "tests/testing/status_matchers.h"
#include "tests/testing/temp_dir.h"
#include "tests/testing/tiny_model.h"

namespace headstart {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::StatusIs;

constexpr int64_t kMiB = 1 << 20;

// A machine of files.
class MachineTest : public ::testing::Test {
 protected:
  void SetUp() override { Write("/proc/meminfo", "MemTotal: 9 kB\nMemAvailable:   1048576 kB\n"); }

  void Write(const std::string& path, const std::string& text) {
    fs::create_directories(fs::path(root() + path).parent_path());
    ASSERT_OK(testing::WriteFile(root() + path, text));
  }
  // A mount of a v2 hierarchy whose group `group` is seen at /sys/fs/cgroup.
  void MountV2(const std::string& group, const std::string& own) {
    Write("/proc/self/mountinfo", "22 1 0:20 / /proc rw - proc proc rw\n30 22 0:26 " + group +
                                      " /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n");
    Write("/proc/self/cgroup", "0::" + own + "\n");
  }
  void MountV1(const std::string& group, const std::string& own) {
    Write("/proc/self/mountinfo",
          "31 22 0:27 " + group +
              " /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n" + "32 22 0:28 " +
              group + " /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n");
    Write("/proc/self/cgroup",
          "5:memory:" + own + "\n4:cpu,cpuacct:" + own + "\n1:name=systemd:/x\n");
  }
  void LimitV2(const std::string& folder, const std::string& limit, int64_t used, int64_t cached) {
    Write(folder + "/memory.max", limit + "\n");
    Write(folder + "/memory.current", std::to_string(used) + "\n");
    Write(folder + "/memory.stat",
          "anon 1\ninactive_file " + std::to_string(cached) + "\nactive_file 0\nactive_files 77\n");
  }
  std::string root() const { return dir_.path(); }
  int64_t Free() const { return FindFreeMemory(root()).value_or(FreeMemory{-1, ""}).bytes; }

  testing::TempDir dir_;
};

int32_t AffinityCpus() {
  cpu_set_t mask;
  return sched_getaffinity(0, sizeof(mask), &mask) == 0 ? CPU_COUNT(&mask) : 1;
}

TEST_F(MachineTest, WithoutGroupsHasWhatTheKernelSays) {
  EXPECT_EQ(UsableCpus(root()), AffinityCpus());
  EXPECT_EQ(Free(), 1024 * kMiB);
  fs::remove_all(root() + "/proc");
  EXPECT_EQ(UsableCpus(root()), AffinityCpus());
  EXPECT_FALSE(FindFreeMemory(root()).has_value());
}

TEST_F(MachineTest, QuotaOfAnyGroupAboveCounts) {
  MountV2("/", "/pod/box");
  Write("/sys/fs/cgroup/pod/box/cpu.max", "max 100000\n");
  EXPECT_EQ(UsableCpus(root()), AffinityCpus());
  Write("/sys/fs/cgroup/pod/cpu.max", "199999 100000\n");
  EXPECT_EQ(UsableCpus(root()), 1);
  Write("/sys/fs/cgroup/pod/cpu.max", "max 100000\n");
  Write("/sys/fs/cgroup/pod/box/cpu.max", "10000 100000\n");  // a tenth of a CPU
  EXPECT_EQ(UsableCpus(root()), 1);
  Write("/sys/fs/cgroup/pod/box/cpu.max", "99900000 100000\n");
  EXPECT_EQ(UsableCpus(root()), AffinityCpus());
}

TEST_F(MachineTest, QuotaOfVersionOne) {
  MountV1("/", "/pod/box");
  Write("/sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs_quota_us", "-1\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/pod/box/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(UsableCpus(root()), AffinityCpus());
  Write("/sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us", "100000\n");
  Write("/sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_period_us", "100000\n");
  EXPECT_EQ(UsableCpus(root()), 1);
}

// With its own view of the tree a container is at the root; without one it is told a path that it
// can't see, or whose end it sees.
TEST_F(MachineTest, QuotaInContainers) {
  Write("/sys/fs/cgroup/cpu.max", "100000 100000\n");
  MountV2("/", "/");
  EXPECT_EQ(UsableCpus(root()), 1);
  MountV2("/docker/abc", "/docker/abc");
  EXPECT_EQ(UsableCpus(root()), 1);
  MountV2("/docker/abc", "/elsewhere");
  EXPECT_EQ(UsableCpus(root()), 1);
  MountV2("/", "/../../elsewhere");
  EXPECT_EQ(UsableCpus(root()), 1);
  Write("/sys/fs/cgroup/cpu.max", "max 100000\n");
  Write("/sys/fs/cgroup/inner/cpu.max", "100000 100000\n");
  MountV2("/docker/abc", "/docker/abc/inner");
  EXPECT_EQ(UsableCpus(root()), 1);
}

TEST_F(MachineTest, MemoryLimitLeavesWhatIsNotUsedButForCache) {
  MountV2("/", "/pod/box");
  LimitV2("/sys/fs/cgroup/pod/box", "max", 10 * kMiB, 0);
  LimitV2("/sys/fs/cgroup/pod", std::to_string(300 * kMiB), 150 * kMiB, 50 * kMiB);
  const std::optional<FreeMemory> free = FindFreeMemory(root());
  ASSERT_TRUE(free.has_value());
  EXPECT_EQ(free->bytes, 200 * kMiB);
  EXPECT_THAT(free->limited_by, AllOf(HasSubstr("314572800"), HasSubstr("/pod/memory.max")));
  LimitV2("/sys/fs/cgroup/pod/box", std::to_string(100 * kMiB), 120 * kMiB, 0);
  EXPECT_EQ(Free(), 0);
}

TEST_F(MachineTest, MemoryLimitOfVersionOne) {
  MountV1("/docker/abc", "/docker/abc/box");
  const std::string group = "/sys/fs/cgroup/memory";
  Write(group + "/box/memory.limit_in_bytes", "9223372036854771712\n");
  Write(group + "/box/memory.usage_in_bytes", "5\n");
  Write(group + "/memory.limit_in_bytes", std::to_string(300 * kMiB));
  Write(group + "/memory.usage_in_bytes", std::to_string(100 * kMiB));
  Write(group + "/memory.stat",
        "inactive_file 1\ntotal_inactive_file 1048576\ntotal_active_file 2097152\n");
  EXPECT_EQ(Free(), 203 * kMiB);
}

TEST(ThreadsTest, AreHadForAMoment) { EXPECT_OK(CheckThreads(8)); }

TEST(ThreadsTest, ThatCantBeHadAreCounted) {
  // In a process of its own, whose memory has no room for stacks.
  const auto check = [] {
    const rlimit memory{512 << 20, 512 << 20};
    setrlimit(RLIMIT_AS, &memory);
    const absl::Status status = CheckThreads(1000);
    std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
    std::_Exit(status.code() == absl::StatusCode::kResourceExhausted ? 7 : 1);
  };
  EXPECT_EXIT(check(), ::testing::ExitedWithCode(7),
              "of 1000 threads only [0-9]+ can be had .*ulimit -v is 524288");
}

}  // namespace
}  // namespace headstart

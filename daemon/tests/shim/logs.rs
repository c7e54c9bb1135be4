//! Logs under pressure: slow and full disks, lines without an end, output that is not text.

use crate::bed::{Bed, PATIENCE, exited, until};
use fermata_daemon::shims::reconnect::{ReconnectOutcome, reconnect};
use fermata_os::cgroup::FreezerSetting;
use fermata_os::process::{self, ProcessId};
use fermata_protocol::supervision::OutputPolicy;
use fermata_shim::log_line::{LogFileLine, Stream};
use fermata_shim::spec::{LogLimits, files};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::statvfs;
use tokio_util::task::TaskTracker;

/// The peak resident size of a process in KiB (`VmHWM`, proc_pid_status(5)).
fn peak_kib(id: ProcessId) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", id.pid)).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_ascii_whitespace().nth(1).unwrap().parse().unwrap()
}

fn output(lines: &[LogFileLine]) -> Vec<u8> {
    let mut all = Vec::new();
    for line in lines.iter().filter(|line| line.stream == Stream::Stdout) {
        all.extend_from_slice(&line.bytes);
        if !line.partial {
            all.push(b'\n');
        }
    }
    all
}

/// Returns the number of bytes that the gap lines report as lost.
fn bytes_in_gaps(lines: &[LogFileLine]) -> u64 {
    let gaps = lines.iter().filter(|line| line.stream == Stream::Gap);
    gaps.map(|line| {
        let text = String::from_utf8_lossy(&line.bytes).into_owned();
        text.split(' ').next().unwrap().parse::<u64>().unwrap_or_else(|_| panic!("{text}"))
    })
    .sum()
}

/// Returns the processes that run as `fermata-shim RUN_DIR`: the shim and its log writer process.
fn shims(bed: &Bed) -> Vec<ProcessId> {
    let run_dir = bed.spec.run_dir.to_string_lossy().into_owned();
    let is_ours = |pid: i32| {
        let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        words.split(|&b| b == 0).nth(1) == Some(run_dir.as_bytes())
    };
    process::all().unwrap().iter().map(|stat| stat.id).filter(|id| is_ours(id.pid)).collect()
}

#[tokio::test]
async fn a_line_of_ten_megabytes_and_bytes_that_are_no_text_cost_the_shim_no_memory() {
    let script = "head -c 10000000 /dev/zero | tr '\\0' x; echo; head -c 3000000 bytes; echo; echo end; \
        while [ ! -e go ]; do sleep 0.01; done";
    let bed = Bed::new(FreezerSetting::Auto, script);
    // Every byte value, with newlines, carriage returns, NULs and incomplete characters among them.
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    std::fs::write(bed.path("bytes"), &bytes).unwrap();
    let (launched, _link, mut events) = bed.launch().await;
    until("all output", || bed.logs().last().is_some_and(|line| line.bytes == b"end")).await;
    let peak = peak_kib(launched.shim);
    assert!(peak < 16 * 1024, "the shim has had {peak} KiB");
    std::fs::write(bed.path("go"), "").unwrap();
    exited(&mut events).await;
    let mut expected = vec![b'x'; 10_000_000];
    expected.push(b'\n');
    expected.extend_from_slice(&bytes);
    expected.extend_from_slice(b"\nend\n");
    assert!(output(&bed.logs()) == expected, "not what was written");
}

#[tokio::test]
async fn an_agent_whose_output_may_be_dropped_never_waits_for_its_log() {
    let script = "echo up; while [ ! -e go ]; do sleep 0.01; done; seq 1 3000000; touch written; \
        while [ ! -e end ]; do sleep 0.01; done; echo last";
    let mut bed = Bed::new(FreezerSetting::Auto, script);
    bed.spec.output = OutputPolicy::Drop;
    let (launched, _link, mut events) = bed.launch().await;
    until("the first line", || !bed.logs().is_empty()).await;
    let log_writers: Vec<_> = shims(&bed).into_iter().filter(|id| *id != launched.shim).collect();
    let [log_writer] = log_writers[..] else { panic!("one log writer process, not {log_writers:?}") };
    // As on a disk that accepts nothing: the log writer is stopped.
    process::signal(log_writer, libc::SIGSTOP).unwrap();
    std::fs::write(bed.path("go"), "").unwrap();
    until("the agent to have written everything", || bed.path("written").exists()).await;
    assert!(output(&bed.logs()).len() < 10_000, "the log grew on a blocked disk");
    process::signal(log_writer, libc::SIGCONT).unwrap();
    std::fs::write(bed.path("end"), "").unwrap();
    let exit = exited(&mut events).await;
    let lines = bed.logs();
    let written = "up\n".len() + (1..=3_000_000).map(|n: u32| n.to_string().len() + 1).sum::<usize>() + "last\n".len();
    let lost = bytes_in_gaps(&lines);
    assert!(lost > 1_000_000, "{lost}");
    assert_eq!(exit.log_bytes_lost, lost);
    // Where a gap cuts a line in two, the first part has no newline.
    let kept: usize = lines
        .iter()
        .filter(|line| line.stream == Stream::Stdout)
        .map(|line| line.bytes.len() + usize::from(!line.partial))
        .sum();
    assert_eq!(kept as u64 + lost, written as u64);
    assert_eq!(lines.last().unwrap().bytes, b"last");
    until("the end of the log writer process", || !process::is_alive(log_writer).unwrap()).await;
}

#[tokio::test]
async fn nothing_is_dropped_without_need_and_a_killed_log_writer_costs_only_what_it_held() {
    let script = "echo one; echo two >&2; while [ ! -e go ]; do sleep 0.01; done; seq 1 1000; echo three";
    for kill in [false, true] {
        let mut bed = Bed::new(FreezerSetting::Auto, script);
        bed.spec.output = OutputPolicy::Drop;
        let (launched, _link, mut events) = bed.launch().await;
        until("two lines", || bed.logs().len() == 2).await;
        if kill {
            for log_writer in shims(&bed).into_iter().filter(|id| *id != launched.shim) {
                process::signal(log_writer, libc::SIGKILL).unwrap();
                until("its end", || !process::is_alive(log_writer).unwrap()).await;
            }
        }
        std::fs::write(bed.path("go"), "").unwrap();
        let exit = exited(&mut events).await;
        let lines = bed.logs();
        let gaps: Vec<_> = lines.iter().filter(|line| line.stream == Stream::Gap).collect();
        assert_eq!(lines.last().unwrap().bytes, b"three");
        if kill {
            assert!(String::from_utf8_lossy(&gaps[0].bytes).contains("was killed"), "{gaps:?}");
        } else {
            assert_eq!((gaps.len(), exit.log_bytes_lost), (0, 0));
            assert_eq!(output(&lines).len(), "one\n".len() + 3893 + "three\n".len());
        }
    }
}

#[tokio::test]
async fn a_shim_that_is_killed_while_it_waits_for_its_log_writer_costs_no_exit_code() {
    let mut bed = Bed::new(FreezerSetting::Auto, "echo one; while [ ! -e go ]; do sleep 0.01; done; exit 7");
    bed.spec.output = OutputPolicy::Drop;
    let (launched, _link, _events) = bed.launch().await;
    until("a line", || bed.logs().len() == 1).await;
    let log_writers: Vec<_> = shims(&bed).into_iter().filter(|id| *id != launched.shim).collect();
    assert_eq!(log_writers.len(), 1);
    assert!(process::signal(log_writers[0], libc::SIGSTOP).unwrap());
    std::fs::write(bed.path("go"), "").unwrap();
    until("the exit to be noted", || bed.spec.file(files::ENDED).exists()).await;
    assert!(process::signal(launched.shim, libc::SIGKILL).unwrap());
    until("the shim to die", || !process::is_alive(launched.shim).unwrap()).await;
    assert!(bed.exit().is_none(), "it waited");
    let boot = process::boot_id().unwrap();
    let ReconnectOutcome::Ended(exit) = reconnect(&bed.spec.run_dir, &boot, PATIENCE, &TaskTracker::new()).await else {
        panic!("its exit is noted")
    };
    assert_eq!((exit.code, exit.post_stop_failure), (Some(7), None));
    process::signal(log_writers[0], libc::SIGCONT).unwrap();
    until("the end of the log writer process", || !process::is_alive(log_writers[0]).unwrap()).await;
}

/// A file system, unmounted when dropped.
struct Mounted(std::path::PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

#[tokio::test]
async fn a_full_disk_never_delays_an_agent_and_the_lost_output_is_reported() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not tested: only root can mount a small file system");
        return;
    }
    for policy in [OutputPolicy::Block, OutputPolicy::Drop] {
        let script = "seq 1 400000; touch written; while [ ! -e go ]; do sleep 0.01; done; n=0; \
            while [ ! -e seen ]; do echo again; n=$((n+1)); sleep 0.02; done; echo $n > agains; exit 3";
        let mut bed = Bed::new(FreezerSetting::Auto, script);
        bed.spec.output = policy;
        bed.spec.log = LogLimits { max_bytes: 0, max_files: 0, max_age_ms: 0 };
        let logs = bed.spec.run_dir.join("logs");
        std::fs::create_dir_all(&logs).unwrap();
        mount(Some("tmpfs"), &logs, Some("tmpfs"), MsFlags::empty(), Some("size=1m,mode=0700")).unwrap();
        let _mounted = Mounted(logs.clone());
        let (_, _link, mut events) = bed.launch().await;
        until("the agent to have written everything", || bed.path("written").exists()).await;
        until("the disk to be full", || statvfs(&logs).unwrap().blocks_free() == 0).await;
        let room = Some("size=64m,mode=0700");
        mount(None::<&str>, &logs, None::<&str>, MsFlags::MS_REMOUNT, room).unwrap();
        std::fs::write(bed.path("go"), "").unwrap();
        // Where output is dropped, the first lines may still find the queue full.
        until("the log to go on", || bed.logs().iter().any(|line| line.bytes == b"again")).await;
        std::fs::write(bed.path("seen"), "").unwrap();
        let exit = exited(&mut events).await;
        assert_eq!(exit.code, Some(3));
        let lines = bed.logs();
        let agains: usize = std::fs::read_to_string(bed.path("agains")).unwrap().trim().parse().unwrap();
        let written = (1..=400_000).map(|n: u32| n.to_string().len() + 1).sum::<usize>() + agains * "again\n".len();
        let lost = bytes_in_gaps(&lines);
        assert!(lost > if policy == OutputPolicy::Block { 1_000_000 } else { 0 }, "{policy:?}: {lost}");
        assert_eq!(exit.log_bytes_lost, lost, "{policy:?}");
        let kept: usize = lines
            .iter()
            .filter(|line| line.stream == Stream::Stdout)
            .map(|line| line.bytes.len() + usize::from(!line.partial))
            .sum();
        assert_eq!(kept as u64 + lost, written as u64, "{policy:?}");
    }
}

//! Launching, ending, logging, and losing daemons and shims.

use std::collections::HashMap;
use std::io::Read;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::bed::{Bed, LONG, PATIENCE, THREE_FILES, THREE_WRITERS, exited, shim_program, until};
use fermata_daemon::shims::launch::LaunchError;
use fermata_daemon::shims::link::{LinkError, ShimLink};
use fermata_daemon::shims::lost::{LostTreeError, end_lost_tree};
use fermata_os::cgroup::FreezerSetting;
use fermata_os::limits::{Limit, LimitKind};
use fermata_os::process;
use fermata_shim::launch_report::LaunchCode;
use fermata_shim::log_line::Stream;
use fermata_shim::log_reader::{LogReader, Start};
use fermata_shim::spec::{LogLimits, files};
use tokio_util::task::TaskTracker;

for_both_mechanisms!(
    an_exit_code_is_recorded_and_reported,
    a_death_by_signal_is_recorded,
    a_real_time_signal_is_recorded_too,
    leftovers_are_killed_when_the_main_process_ends,
    a_stop_is_obeyed_or_becomes_a_kill,
    an_agent_that_another_process_has_suspended_can_be_ended,
    nothing_is_left_after_a_lost_shim_was_cleaned_up,
    the_death_of_the_launching_process_does_not_matter,
);

async fn an_exit_code_is_recorded_and_reported(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "echo out; echo err >&2; read line; exit 42");
    // stdin is empty, so the read ends at once: the exit may come before the link.
    let launched = bed.try_launch().await.unwrap();
    let exit = bed.exit_record().await;
    assert_eq!((exit.code, exit.signal, exit.core_dumped), (Some(42), None, false));
    assert_eq!(exit.run_id, bed.spec.run_id);
    assert_eq!(bed.run().agent, launched.agent);
    assert_eq!(bed.run().boot_id, process::boot_id().unwrap());
    until("the shim's end", || !process::is_alive(launched.shim).unwrap()).await;
    assert!(!bed.spec.socket.exists());
    let mut logs = bed.logs();
    logs.sort_by_key(|line| line.bytes.clone());
    assert_eq!((logs[0].stream, &logs[0].bytes[..]), (Stream::Stderr, &b"err"[..]));
    assert_eq!((logs[1].stream, &logs[1].bytes[..]), (Stream::Stdout, &b"out"[..]));
    assert!(matches!(ShimLink::connect(&bed.spec.socket, &TaskTracker::new()).await, Err(LinkError::Connect { .. })));
}

async fn a_death_by_signal_is_recorded(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "while :; do sleep 60; done");
    let (_, link, mut events) = bed.launch().await;
    link.signal(libc::SIGUSR1).await.unwrap();
    let exit = exited(&mut events).await;
    assert_eq!((exit.code, exit.signal), (None, Some(libc::SIGUSR1)));
    assert_eq!(bed.exit(), Some(exit));
    link.closed().await;
    assert!(matches!(link.status().await, Err(LinkError::Closed)));
}

async fn a_real_time_signal_is_recorded_too(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "while :; do sleep 60; done");
    let (_, link, mut events) = bed.launch().await;
    link.signal(libc::SIGRTMIN() + 3).await.unwrap();
    assert_eq!(exited(&mut events).await.signal, Some(libc::SIGRTMIN() + 3));
}

async fn leftovers_are_killed_when_the_main_process_ends(mechanism: FreezerSetting) {
    let script = "setsid sleep 600 & (setsid sh -c 'sleep 600; :' &) ; trap '' HUP; sleep 600 &
        while [ ! -e go ]; do sleep 0.01; done; exit 3";
    let bed = Bed::new(mechanism, script);
    let (_, link, mut events) = bed.launch().await;
    until("the tree", || bed.living().len() >= 5).await;
    std::fs::write(bed.path("go"), "").unwrap();
    let exit = exited(&mut events).await;
    assert_eq!(exit.code, Some(3));
    assert!(exit.leftovers_killed >= 2, "{exit:?}");
    assert_eq!(bed.living(), [] as [i32; 0]);
    drop(link);
}

async fn a_stop_is_obeyed_or_becomes_a_kill(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done");
    let (_, link, mut events) = bed.launch().await;
    until("the trap", || !bed.logs().is_empty()).await;
    link.stop(None).await.unwrap();
    assert_eq!(exited(&mut events).await.code, Some(5));

    let bed = Bed::new(mechanism, "trap '' TERM; echo up; while :; do sleep 0.01; done");
    let (_, link, mut events) = bed.launch().await;
    until("the trap", || !bed.logs().is_empty()).await;
    link.stop(Some(LONG)).await.unwrap();
    // A second stop with a shorter grace takes effect.
    link.stop(Some(Duration::from_millis(100))).await.unwrap();
    assert_eq!(exited(&mut events).await.signal, Some(libc::SIGKILL));
    assert_eq!(bed.living(), [] as [i32; 0]);
}

async fn an_agent_that_another_process_has_suspended_can_be_ended(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done");
    let (_, link, mut events) = bed.launch().await;
    until("the trap", || !bed.logs().is_empty()).await;
    link.signal(libc::SIGSTOP).await.unwrap();
    link.stop(Some(LONG)).await.unwrap();
    assert_eq!(exited(&mut events).await.code, Some(5));
}

async fn nothing_is_left_after_a_lost_shim_was_cleaned_up(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (launched, link, mut events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    let (run, boot) = (bed.run(), process::boot_id().unwrap());
    assert!(matches!(end_lost_tree(&run, &boot, PATIENCE), Err(LostTreeError::ShimAlive { .. })));
    link.freeze(LONG).await.unwrap();
    process::signal(launched.shim, libc::SIGKILL).unwrap();
    until("the end of the link", || events.try_recv() == Err(tokio::sync::mpsc::error::TryRecvError::Disconnected))
        .await;
    until("the end of the shim", || !process::is_alive(launched.shim).unwrap()).await;
    assert_eq!(bed.exit(), None);
    assert_eq!(end_lost_tree(&run, "another boot", PATIENCE).unwrap(), 0);
    assert!(end_lost_tree(&run, &boot, PATIENCE).unwrap() >= 3);
    assert_eq!(bed.living(), [] as [i32; 0]);
    assert_eq!(end_lost_tree(&run, &boot, PATIENCE).unwrap(), 0);
}

async fn the_death_of_the_launching_process_does_not_matter(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "echo up; while [ ! -e go ]; do sleep 0.01; done; exit 9");
    std::fs::create_dir_all(&bed.spec.run_dir).unwrap();
    std::fs::write(bed.spec.run_dir.join(files::LAUNCH), serde_json::to_vec(&bed.spec).unwrap()).unwrap();
    // A substitute for the daemon: runs the launcher, then dies with its whole process group.
    let mut parent = Command::new("setsid")
        .args(["-w", "sh", "-c", "\"$0\" \"$1\"; echo launched; read never"])
        .arg(shim_program())
        .arg(&bed.spec.run_dir)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    let mut stdout = parent.stdout.take().unwrap();
    while !said.ends_with(b"launched\n") {
        let mut byte = [0];
        stdout.read_exact(&mut byte).unwrap();
        said.push(byte[0]);
    }
    let tree = process::descendants(parent.id() as i32, process::ProcScan::Thorough).unwrap();
    for stat in tree.iter().rev() {
        process::signal(stat.id, libc::SIGKILL).unwrap();
    }
    parent.kill().unwrap();
    parent.wait().unwrap();
    let (link, mut events) = bed.connect().await;
    assert_eq!(link.status().await.unwrap().agent, bed.run().agent);
    std::fs::write(bed.path("go"), "").unwrap();
    assert_eq!(exited(&mut events).await.code, Some(9));
}

fn refusal(result: Result<impl std::fmt::Debug, LaunchError>) -> (LaunchCode, String) {
    match result {
        Err(LaunchError::Refused { code, message }) => (code, message),
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[tokio::test]
async fn a_launch_that_cannot_work_says_why_and_leaves_nothing() {
    type Change = fn(&mut Bed);
    let script = |bed: &Bed, name: &str, text: &str, mode: u32| {
        use std::os::unix::fs::PermissionsExt;
        let path = bed.path(name);
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let cases: [(LaunchCode, Change); 7] = [
        (LaunchCode::ProgramNotFound, |bed| bed.spec.argv = vec!["no-such-program".into()]),
        (LaunchCode::ProgramNotFound, |bed| bed.spec.argv = vec!["./nowhere".into()]),
        (LaunchCode::ProgramNotExecutable, |bed| bed.spec.argv = vec!["./plain".into()]),
        (LaunchCode::InterpreterMissing, |bed| bed.spec.argv = vec!["./script".into()]),
        (LaunchCode::CwdMissing, |bed| bed.spec.cwd = bed.path("nowhere")),
        (LaunchCode::BadSpec, |bed| bed.spec.version = 99),
        (LaunchCode::SocketPathTooLong, |bed| bed.spec.socket = bed.path(&"x".repeat(120))),
    ];
    for (expected, change) in cases {
        let mut bed = Bed::new(FreezerSetting::Auto, "exit 0");
        script(&bed, "plain", "text", 0o644);
        script(&bed, "script", "#!/no/such/interpreter\n", 0o755);
        change(&mut bed);
        let (code, message) = refusal(bed.try_launch().await);
        assert_eq!(code, expected, "{message}");
        assert!(!bed.spec.run_dir.join(files::RUN).exists());
        assert!(!bed.spec.socket.exists());
        assert_eq!(bed.living(), [] as [i32; 0]);
    }
}

#[tokio::test]
async fn a_spec_of_another_version_is_refused_with_both_versions() {
    let mut bed = Bed::new(FreezerSetting::Auto, "exit 0");
    bed.spec.version = 99;
    let (_, message) = refusal(bed.try_launch().await);
    assert!(message.contains("99") && message.contains("supports version 1"), "{message}");
}

#[tokio::test]
async fn the_agent_gets_its_own_environment_limits_mask_and_default_signals() {
    use std::os::unix::ffi::OsStrExt;
    let script = r#"echo "pwd=$(pwd)"; echo "umask=$(umask)"; echo "files=$(ulimit -Sn)"; grep ^Sig /proc/self/status;
        echo "fds=$(ls /proc/self/fd | wc -l)"; read -r _ _ _ _ pgrp sid _ < /proc/$$/stat; echo "pid=$$ pgrp=$pgrp sid=$sid";
        /bin/echo "raw=$RAW"; echo "odd=$FERMATA_RUN_ID""#;
    let mut bed = Bed::new(FreezerSetting::Auto, script);
    bed.spec.umask = 0o027;
    bed.spec.rlimits = vec![Limit { kind: LimitKind::Nofile, soft: Some(123), hard: Some(456) }];
    bed.spec.env.push(("RAW".into(), std::ffi::OsStr::from_bytes(b"\xff\x01").into()));
    let launched = bed.try_launch().await.unwrap();
    bed.exit_record().await;
    let mut found: HashMap<String, String> = HashMap::new();
    let mut raw = Vec::new();
    for line in bed.logs() {
        if let Some(bytes) = line.bytes.strip_prefix(b"raw=") {
            raw = bytes.to_vec();
        }
        let text = String::from_utf8_lossy(&line.bytes).into_owned();
        if let Some((key, value)) = text.split_once(['=', ':']) {
            found.insert(key.to_owned(), value.trim().to_owned());
        }
    }
    assert_eq!(raw, b"\xff\x01");
    assert_eq!(found["pwd"], bed.spec.cwd.to_string_lossy());
    assert_eq!(found["umask"], "0027");
    assert_eq!(found["files"], "123");
    assert_eq!(found["SigIgn"], "0000000000000000");
    assert_eq!(found["SigBlk"], "0000000000000000");
    // stdin, stdout, stderr, and the descriptor with which ls reads the directory.
    assert_eq!(found["fds"], "4");
    assert_eq!(found["odd"], bed.spec.run_id);
    let (pid, shim) = (launched.agent.pid, launched.shim.pid);
    assert_eq!(found["pid"], format!("{pid} pgrp={pid} sid={shim}"));
}

#[tokio::test]
async fn a_hundred_thousand_lines_arrive_in_order_across_rotation() {
    let script = "i=0; while [ $i -lt 100000 ]; do echo \"line $i\"; i=$((i+1)); done";
    let mut bed = Bed::new(FreezerSetting::Auto, script);
    bed.spec.log = LogLimits { max_bytes: 60_000, max_files: 0, max_age_ms: 0 };
    let launched = bed.try_launch().await.unwrap();
    let mut reader = LogReader::open(&bed.spec.run_dir.join("logs"), Start::Begin).unwrap();
    let mut next = 0;
    loop {
        // Checked before the read, so that output written before the end is read after it.
        let ended = !process::is_alive(launched.shim).unwrap();
        let batch = reader.next_batch(1 << 18).unwrap();
        if batch.is_empty() {
            if ended {
                break;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        for line in batch {
            assert_eq!(line.bytes, format!("line {next}").into_bytes());
            next += 1;
        }
    }
    assert_eq!(next, 100_000);
    assert_eq!(bed.logs().len(), 100_000);
    assert!(std::fs::read_dir(bed.spec.run_dir.join("logs")).unwrap().count() > 10);
    assert_eq!(bed.exit().unwrap().code, Some(0));
}

#[tokio::test]
async fn a_silent_peer_never_blocks_the_shim() {
    let bed = Bed::new(FreezerSetting::Auto, "while :; do sleep 60; done");
    let (_, link, mut events) = bed.launch().await;
    let silent: Vec<_> = (0..5).map(|_| std::os::unix::net::UnixStream::connect(&bed.spec.socket).unwrap()).collect();
    let mut flood = std::os::unix::net::UnixStream::connect(&bed.spec.socket).unwrap();
    flood.set_nonblocking(true).unwrap();
    let line = b"{\"hello\":{\"version\":1}}\n".repeat(400);
    for _ in 0..200 {
        std::io::Write::write_all(&mut flood, &line).ok();
    }
    link.status().await.unwrap();
    link.kill().await.unwrap();
    exited(&mut events).await;
    drop(silent);
}

#[tokio::test]
async fn a_group_that_cannot_be_used_falls_back_to_signals_and_says_why() {
    let mut bed = Bed::new(FreezerSetting::Auto, "exit 0");
    bed.spec.cgroup_parent = Some(bed.path("no-group"));
    let launched = bed.try_launch().await.unwrap();
    assert!(launched.why.unwrap().contains("no-group"));
    assert_eq!(bed.exit_record().await.code, Some(0));
}

#[tokio::test]
async fn the_shim_is_small() {
    let bed = Bed::new(FreezerSetting::Auto, "while :; do sleep 60; done");
    let (launched, _link, _events) = bed.launch().await;
    let rollup = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", launched.shim.pid)).unwrap();
    let dirty: u64 = rollup
        .lines()
        .filter(|line| line.starts_with("Private_Dirty:"))
        .filter_map(|line| line.split_ascii_whitespace().nth(1)?.parse::<u64>().ok())
        .sum();
    assert!(dirty < 4096, "the shim has {dirty} KiB of its own");
    let tasks = std::fs::read_dir(format!("/proc/{}/task", launched.shim.pid)).unwrap().count();
    assert_eq!(tasks, 1);
}

//! Shims that are stopped, have lost their socket, are dead or of another version.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::bed::{Bed, LONG, PATIENCE, exited, until};
use fermata_daemon::shims::link::{LinkError, ShimLink};
use fermata_daemon::shims::reconnect::{ReconnectOutcome, connect, reconnect};
use fermata_os::cgroup::FreezerSetting;
use fermata_os::process::{self, ProcessId};
use fermata_shim::record::RunRecord;
use fermata_shim::spec::files;
use fermata_shim::wire::{FromShim, LineFromShim, RefusalCode, ShimEvent, TreeState, parse_line};
use serde_json::error::Category;
use tokio_util::task::TaskTracker;

/// Lines that shims of this version sent at its release, and lines of newer shims.
const LINES: &str = include_str!("../golden/shim_version_1.jsonl");

for_both_mechanisms!(
    a_shim_that_another_process_has_stopped_is_continued_and_kept,
    a_shim_whose_socket_was_removed_makes_it_anew,
    a_shim_that_cannot_be_brought_to_answer_is_ended_with_its_tree,
    the_output_that_a_killed_shim_had_not_read_is_kept,
    a_recycled_pid_in_the_record_is_never_signalled,
    a_shim_of_another_version_is_left_alone,
    an_unreadable_record_ends_no_process,
);

fn boot() -> String {
    process::boot_id().unwrap()
}

const TICKS: &str = "trap '' PIPE; i=0; while :; do i=$((i+1)); echo $i; echo x >> near; sleep 0.01; done";

async fn a_shim_that_another_process_has_stopped_is_continued_and_kept(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, TICKS);
    let (launched, link, _events) = bed.launch().await;
    assert!(process::signal(launched.shim, libc::SIGSTOP).unwrap());
    let ReconnectOutcome::Linked(linked) = reconnect(&bed.spec.run_dir, &boot(), PATIENCE, &TaskTracker::new()).await
    else {
        panic!("the shim is alive")
    };
    assert_eq!(linked.0.status().await.unwrap().state, TreeState::Running);
    // A request on an open link only raises doubt; the link's owner then wakes the shim.
    assert!(process::signal(launched.shim, libc::SIGSTOP).unwrap());
    let woken = async {
        link.doubted().await;
        fermata_daemon::shims::reconnect::wake(launched.shim)
    };
    let (status, woken) = tokio::join!(link.status(), woken);
    assert!(woken && status.unwrap().state == TreeState::Running);
    bed.growing(&["near"]).await;
}

async fn a_shim_whose_socket_was_removed_makes_it_anew(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, TICKS);
    let (launched, link, _events) = bed.launch().await;
    // Without a reason, the signal changes nothing.
    let ctime = |path: &std::path::Path| std::fs::metadata(path).unwrap().modified().unwrap();
    let before = ctime(&bed.spec.socket);
    assert!(process::signal(launched.shim, libc::SIGHUP).unwrap());
    link.status().await.unwrap();
    assert_eq!(ctime(&bed.spec.socket), before);

    std::fs::remove_file(&bed.spec.socket).unwrap();
    let (again, _more) = connect(&bed.run(), PATIENCE, &TaskTracker::new()).await.unwrap();
    assert_eq!(again.shim(), launched.shim);
    link.status().await.unwrap();
    // The whole directory, as after a restart of a service without a persistent runtime directory.
    std::fs::remove_dir_all(bed.path("s")).unwrap();
    let (_again, _more) = connect(&bed.run(), PATIENCE, &TaskTracker::new()).await.unwrap();
    // A file in its place without a listener.
    std::fs::remove_file(&bed.spec.socket).unwrap();
    drop(UnixListener::bind(&bed.spec.socket).unwrap());
    let (_again, _more) = connect(&bed.run(), PATIENCE, &TaskTracker::new()).await.unwrap();
    bed.growing(&["near"]).await;
}

async fn a_shim_that_cannot_be_brought_to_answer_is_ended_with_its_tree(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, TICKS);
    let (launched, link, _events) = bed.launch().await;
    bed.growing(&["near"]).await;
    // A process keeps stopping the shim.
    let (over, shim) = (Arc::new(AtomicBool::new(false)), launched.shim);
    let end = Arc::clone(&over);
    let insists = std::thread::spawn(move || {
        while !end.load(Ordering::Relaxed) && process::signal(shim, libc::SIGSTOP).unwrap_or(false) {
            std::thread::yield_now();
        }
    });
    let mut reached = reconnect(&bed.spec.run_dir, &boot(), Duration::from_millis(300), &TaskTracker::new()).await;
    // Between two stops the shim may have had the time to answer.
    while let ReconnectOutcome::Linked(_) = reached {
        assert!(process::is_alive(launched.agent).unwrap());
        reached = reconnect(&bed.spec.run_dir, &boot(), Duration::from_millis(300), &TaskTracker::new()).await;
    }
    over.store(true, Ordering::Relaxed);
    insists.join().unwrap();
    let ReconnectOutcome::Lost { detail, remaining: None } = reached else {
        panic!("it neither ended nor changed its version")
    };
    assert!(detail.contains("could not be reached"), "{detail}");
    assert!(!process::is_alive(launched.shim).unwrap());
    assert_eq!(bed.living(), [] as [i32; 0]);
    link.closed().await;
}

async fn an_unreadable_record_ends_no_process(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, TICKS);
    let (launched, _link, _events) = bed.launch().await;
    // A directory in its place: read(2) fails, also for root.
    let exit = bed.spec.file(files::EXIT);
    std::fs::create_dir(&exit).unwrap();
    let ReconnectOutcome::Unknown(why) = reconnect(&bed.spec.run_dir, &boot(), PATIENCE, &TaskTracker::new()).await
    else {
        panic!("it is not known")
    };
    assert!(why.contains(files::EXIT), "{why}");
    std::fs::remove_dir(&exit).unwrap();
    let (run, aside) = (bed.spec.file(files::RUN), bed.path("aside"));
    std::fs::rename(&run, &aside).unwrap();
    std::fs::create_dir(&run).unwrap();
    let ReconnectOutcome::Unknown(why) = reconnect(&bed.spec.run_dir, &boot(), PATIENCE, &TaskTracker::new()).await
    else {
        panic!("it is not known")
    };
    assert!(why.contains(files::RUN), "{why}");
    assert!(process::is_alive(launched.shim).unwrap() && process::is_alive(launched.agent).unwrap());
    std::fs::remove_dir(&run).unwrap();
    std::fs::rename(&aside, &run).unwrap();
    assert!(matches!(
        reconnect(&bed.spec.run_dir, &boot(), PATIENCE, &TaskTracker::new()).await,
        ReconnectOutcome::Linked(_)
    ));
    bed.growing(&["near"]).await;
}

async fn the_output_that_a_killed_shim_had_not_read_is_kept(mechanism: FreezerSetting) {
    let bed = Bed::new(
        mechanism,
        "seq 1 100; echo error 1 >&2; touch begun; while [ ! -e go ]; do sleep 0.01; done; \
         seq 101 5000; echo error 2 >&2; touch written; exec sleep 1000",
    );
    let (launched, _link, _events) = bed.launch().await;
    until("the first lines", || bed.logs().len() == 101).await;
    // The process reads no more, but its ends of the pipes stay open until it is killed.
    assert!(process::signal(launched.shim, libc::SIGSTOP).unwrap());
    std::fs::write(bed.path("go"), "").unwrap();
    until("the rest to be in the pipes", || bed.path("written").exists()).await;
    assert!(process::signal(launched.shim, libc::SIGKILL).unwrap());
    until("the shim to die", || !process::is_alive(launched.shim).unwrap()).await;
    let ReconnectOutcome::Lost { detail, remaining: None } =
        reconnect(&bed.spec.run_dir, &boot(), PATIENCE, &TaskTracker::new()).await
    else {
        panic!("its shim was killed")
    };
    assert!(detail.contains("its shim was killed"), "{detail}");
    assert_eq!(bed.living(), [] as [i32; 0]);
    let (mut out, mut err) = (Vec::new(), Vec::new());
    for line in bed.logs() {
        let text = String::from_utf8(line.bytes.to_vec()).unwrap();
        if line.stream.word() == "stderr" { err.push(text) } else { out.push(text) }
    }
    assert!(out.iter().map(String::as_str).eq((1..=5000).map(|n| n.to_string()).collect::<Vec<_>>()), "a gap");
    assert_eq!(err, ["error 1", "error 2"]);
}

async fn a_recycled_pid_in_the_record_is_never_signalled(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "exec sleep 1000");
    let (_launched, link, mut events) = bed.launch().await;
    let record = bed.run();
    link.kill().await.unwrap();
    exited(&mut events).await;
    link.closed().await;
    until("the shim to end", || !process::is_alive(record.shim).unwrap()).await;
    std::fs::remove_file(bed.spec.run_dir.join(files::EXIT)).unwrap();
    // Unrelated processes now have the pids of shim and agent; that of the shim leads a session, as shims do.
    let strangers = ["setsid sleep 1000", "sleep 1000"]
        .map(|command| std::process::Command::new("sh").args(["-c", &format!("exec {command}")]).spawn().unwrap());
    let ids: Vec<ProcessId> =
        strangers.iter().map(|child| process::identify(child.id() as i32).unwrap().unwrap()).collect();
    until("one to lead a session", || {
        process::stat(ids[0].pid).unwrap().is_some_and(|stat| stat.session == ids[0].pid)
    })
    .await;
    let of_others = |id: ProcessId| ProcessId { start_time_ticks: id.start_time_ticks - 1, ..id };
    let crafted = RunRecord { shim: of_others(ids[0]), agent: of_others(ids[1]), ..record };
    std::fs::write(bed.spec.run_dir.join(files::RUN), serde_json::to_vec(&crafted).unwrap()).unwrap();
    let reached = reconnect(&bed.spec.run_dir, &boot(), PATIENCE, &TaskTracker::new()).await;
    assert!(matches!(reached, ReconnectOutcome::Lost { remaining: None, .. }));
    let unreached = connect(&crafted, Duration::from_millis(100), &TaskTracker::new()).await.map(drop);
    assert_eq!(unreached, Err("its shim is dead".to_owned()));
    for (mut child, id) in strangers.into_iter().zip(ids) {
        let stat = process::stat_of(id).unwrap().expect("a stranger was killed");
        assert!(!matches!(stat.letter, b'T' | b'Z'), "a stranger was signalled: {}", stat.letter as char);
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

/// Answers the next connection with one line, as a shim of another version would.
fn answering(listener: UnixListener, line: String) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut hello = String::new();
        BufReader::new(stream.try_clone().unwrap()).read_line(&mut hello).unwrap();
        writeln!(stream, "{line}").unwrap();
    })
}

async fn a_shim_of_another_version_is_left_alone(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, TICKS);
    let (launched, link, _events) = bed.launch().await;
    let run_id = &bed.spec.run_id;
    for said in [
        r#"{"refusal":{"id":null,"code":"version_mismatch","message":"the peer speaks version 1, this shim speaks version 2"}}"#.to_owned(),
        format!(r#"{{"hello":{{"version":2,"run_id":"{run_id}","shim":{{"pid":1,"start":1}},"more":[]}}}}"#),
    ] {
        std::fs::remove_file(&bed.spec.socket).unwrap();
        let other = answering(UnixListener::bind(&bed.spec.socket).unwrap(), said);
        let ReconnectOutcome::Foreign(why) = reconnect(&bed.spec.run_dir, &boot(), PATIENCE, &TaskTracker::new()).await else { panic!("it is foreign") };
        assert!(why.contains("version 2") && why.contains("version 1"), "{why}");
        other.join().unwrap();
        assert!(process::is_alive(launched.shim).unwrap());
        bed.growing(&["near"]).await;
    }
    assert_eq!(link.status().await.unwrap().state, TreeState::Running);
    // The other way round: this shim and a newer daemon.
    let (again, _more) = connect(&bed.run(), PATIENCE, &TaskTracker::new()).await.unwrap();
    again.status().await.unwrap();
    let stream = std::os::unix::net::UnixStream::connect(&bed.spec.socket).unwrap();
    writeln!(&stream, r#"{{"hello":{{"version":2,"level":7,"more":true}}}}"#).unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    assert!(answer.contains("version_mismatch") && answer.contains("version 2"), "{answer}");
    bed.growing(&["near"]).await;
}

#[tokio::test]
async fn what_a_newer_daemon_may_ask_is_refused_by_its_id_and_harms_nothing() {
    let bed = Bed::new(FreezerSetting::Signals, TICKS);
    let (_, link, _events) = bed.launch().await;
    let stream = std::os::unix::net::UnixStream::connect(&bed.spec.socket).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
    writeln!(&stream, r#"{{"hello":{{"version":1,"level":99}}}}"#).unwrap();
    assert!(lines.next().unwrap().contains("hello"));
    writeln!(&stream, r#"{{"call":{{"id":7,"method":"teleport","params":{{}}}}}}"#).unwrap();
    writeln!(&stream, r#"{{"call":{{"id":8,"method":"status","params":{{"soon":true}}}}}}"#).unwrap();
    let (unknown, known) = (lines.next().unwrap(), lines.next().unwrap());
    assert!(unknown.contains(r#""id":7"#) && unknown.contains("bad_request"), "{unknown}");
    assert!(known.contains(r#""id":8"#) && known.contains("running"), "{known}");
    link.freeze(LONG).await.unwrap();
}

#[test]
fn lines_of_older_and_newer_shims_of_this_version_are_understood() {
    for line in LINES.lines().filter(|line| !line.starts_with('#')) {
        let parsed = parse_line(line.as_bytes()).unwrap_or_else(|error| panic!("{error}: {line}"));
        match parsed {
            LineFromShim::NewerEvent(_) => assert!(line.contains("from_the_future"), "{line}"),
            LineFromShim::Understood(FromShim::Refusal { code, .. }) if line.contains("from_the_future") => {
                assert_eq!(code, RefusalCode::Other);
            }
            LineFromShim::Understood(FromShim::Event(ShimEvent::Exited(record))) => {
                assert_eq!(record.code, Some(3), "{line}")
            }
            LineFromShim::Understood(_) => {}
        }
    }
    let data = Category::Data;
    for (line, category) in
        [("rubbish", Category::Syntax), (r#"{"hello":7}"#, data), (r#"{"from_the_future":{}}"#, data)]
    {
        assert_eq!(parse_line(line.as_bytes()).map(drop).unwrap_err().classify(), category, "{line}");
    }
}

#[tokio::test]
async fn a_daemon_passes_over_what_a_newer_shim_tells() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let said = LINES.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    let shim = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        writeln!(stream, "{said}").unwrap();
        stream
    });
    let (link, mut events) = ShimLink::connect(&socket, &TaskTracker::new()).await.unwrap();
    let stream = shim.join().unwrap();
    let mut kinds = Vec::new();
    while kinds.len() < 5 {
        kinds.push(tokio::time::timeout(PATIENCE, events.recv()).await.unwrap().expect("the link holds"));
    }
    assert!(matches!(kinds[0], ShimEvent::Stopped { signal: 20 }), "{kinds:?}");
    assert!(matches!(kinds[4], ShimEvent::Exited(_)), "{kinds:?}");
    drop(stream);
    assert!(matches!(link.status().await, Err(LinkError::Closed)));
}

//! Frozen trees that another process continues, and trees that are killed: with both mechanisms and real processes.

use std::time::Duration;

use crate::bed::{Bed, LONG, THREE_FILES, THREE_WRITERS, exited, next, one_writer, until};
use fermata_daemon::shims::link::{LinkError, ShimLink};
use fermata_os::cgroup::FreezerSetting;
use fermata_os::cgroup::Group;
use fermata_os::process::{self, ProcessId, RunState};
use fermata_shim::wire::{FreezeBroken, QuiesceOutcome, RefusalCode, ShimEvent, TreeState};
use tokio::sync::mpsc;

for_both_mechanisms!(
    a_stray_sigcont_does_not_let_a_frozen_tree_run_unnoticed,
    the_freeze_of_a_tree_that_was_continued_under_a_lease_cannot_be_committed,
    a_freeze_after_a_broken_one_counts_again,
    a_thaw_after_a_stray_sigcont_lets_every_process_run,
    a_shell_does_not_go_on_with_its_script_when_its_child_is_killed,
    a_shell_does_not_go_on_with_its_script_when_its_child_is_killed_with_a_frozen_tree,
    leftovers_do_not_go_on_with_their_scripts,
    a_forking_tree_is_killed_completely,
    a_job_in_a_session_of_its_own_ignores_sigtstp_and_is_frozen_all_the_same,
    a_parent_in_vfork_counts_as_stopped,
    an_agent_that_dies_between_its_steps_is_answered,
);

/// Returns the processes of the run other than its main process.
fn others(bed: &Bed, main: ProcessId) -> Vec<ProcessId> {
    let all = bed.living().into_iter().filter_map(|pid| process::identify(pid).unwrap());
    all.filter(|id| *id != main).collect()
}

/// A process and its child that never wait for a child of their own: SIGCONT lets each of them run at once. A shell
/// may be in vfork, which SIGCONT does not end while the child is stopped.
fn two_writers(mechanism: FreezerSetting) -> Bed {
    let mut bed = Bed::new(mechanism, "");
    bed.spec.argv = one_writer("fork;");
    bed
}

async fn broken(events: &mut mpsc::Receiver<ShimEvent>) -> FreezeBroken {
    loop {
        match next(events).await {
            Some(ShimEvent::FreezeBroken(broken)) => return broken,
            Some(_) => {}
            None => panic!("the link ended"),
        }
    }
}

fn refused(result: Result<impl std::fmt::Debug, LinkError>) -> RefusalCode {
    match result {
        Err(LinkError::Refused { code, .. }) => code,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

/// A signal does not thaw a group: there is nothing to report.
async fn nothing_was_broken(link: &ShimLink, events: &mut mpsc::Receiver<ShimEvent>) {
    link.status().await.unwrap();
    assert!(events.try_recv().is_err(), "SIGCONT does not thaw a group");
}

async fn a_stray_sigcont_does_not_let_a_frozen_tree_run_unnoticed(mechanism: FreezerSetting) {
    let bed = two_writers(mechanism);
    let (launched, link, mut events) = bed.launch().await;
    bed.growing(&["near"]).await;
    until("both to work", || bed.living().len() == 2).await;
    link.freeze(LONG).await.unwrap();
    link.commit_freeze().await.unwrap();
    bed.still(&["near"]).await;
    let by_signals = bed.run().cgroup.is_none();
    // The kernel notifies the shim about its own children; the others it has to poll.
    for victims in [vec![launched.agent], others(&bed, launched.agent)] {
        for victim in &victims {
            assert!(process::signal(*victim, libc::SIGCONT).unwrap());
        }
        if by_signals {
            let report = broken(&mut events).await;
            assert!(
                report.committed && report.frozen_again && report.times >= 1 && report.processes >= 1,
                "{report:?}"
            );
        } else {
            nothing_was_broken(&link, &mut events).await;
        }
        bed.still(&["near"]).await;
    }
    let status = link.status().await.unwrap();
    assert_eq!((status.state, status.committed), (TreeState::Frozen, true));
    link.thaw().await.unwrap();
    bed.growing(&["near"]).await;
}

async fn the_freeze_of_a_tree_that_was_continued_under_a_lease_cannot_be_committed(mechanism: FreezerSetting) {
    let bed = two_writers(mechanism);
    let (launched, link, mut events) = bed.launch().await;
    bed.growing(&["near"]).await;
    until("both to work", || bed.living().len() == 2).await;
    link.freeze(LONG).await.unwrap();
    link.renew(LONG).await.unwrap();
    let victim = others(&bed, launched.agent)[0];
    let before = process::ran(victim.pid).unwrap();
    assert!(process::signal(victim, libc::SIGCONT).unwrap());
    if bed.run().cgroup.is_some() {
        nothing_was_broken(&link, &mut events).await;
        link.renew(LONG).await.unwrap();
        return link.commit_freeze().await.unwrap();
    }
    // Longer than the last steps of a process that is being stopped can take, or so long that the shim has noticed it.
    let ns = |ran: Option<process::Ran>| ran.expect("this kernel counts").ns;
    let stopped = || process::stat_of(victim).unwrap().unwrap().state() == RunState::Stopped;
    until("it to run", || {
        let ran = process::ran(victim.pid).unwrap();
        ns(ran) > ns(before) + 100_000 || ran != before && stopped()
    })
    .await;
    // Stopped again before the shim could notice it: the process has run nevertheless.
    assert!(process::signal(victim, libc::SIGSTOP).unwrap());
    assert_eq!(refused(link.renew(LONG).await), RefusalCode::FreezeBroken);
    assert_eq!(refused(link.commit_freeze().await), RefusalCode::FreezeBroken);
    let report = broken(&mut events).await;
    assert!(!report.committed && report.frozen_again && report.processes >= 1, "{report:?}");
    bed.still(&["near"]).await;
    assert_eq!(refused(link.commit_freeze().await), RefusalCode::FreezeBroken, "it stays so");
    link.thaw().await.unwrap();
    bed.growing(&["near"]).await;
}

async fn a_freeze_after_a_broken_one_counts_again(mechanism: FreezerSetting) {
    let bed = two_writers(mechanism);
    let (launched, link, mut events) = bed.launch().await;
    bed.growing(&["near"]).await;
    link.freeze(LONG).await.unwrap();
    assert!(process::signal(launched.agent, libc::SIGCONT).unwrap());
    if bed.run().cgroup.is_none() {
        broken(&mut events).await;
    }
    link.freeze(LONG).await.unwrap();
    link.renew(LONG).await.unwrap();
    link.commit_freeze().await.unwrap();
    bed.still(&["near"]).await;
}

async fn a_thaw_after_a_stray_sigcont_lets_every_process_run(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (launched, link, mut events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    for _ in 0..10 {
        link.freeze(LONG).await.unwrap();
        for victim in others(&bed, launched.agent).into_iter().chain([launched.agent]) {
            process::signal(victim, libc::SIGCONT).unwrap();
        }
        // Often while the tree is being frozen again.
        link.thaw().await.unwrap();
        bed.growing(&THREE_FILES).await;
    }
    while events.try_recv().is_ok() {}
    assert_eq!(link.status().await.unwrap().state, TreeState::Running);
}

#[tokio::test]
async fn a_group_that_another_process_thaws_is_frozen_again_and_that_is_reported() {
    let bed = Bed::new(FreezerSetting::Auto, THREE_WRITERS);
    let (_, link, mut events) = bed.launch().await;
    let Some(group) = bed.run().cgroup else { return };
    bed.growing(&THREE_FILES).await;
    link.freeze(LONG).await.unwrap();
    Group::open(&group).unwrap().thaw().unwrap();
    let report = broken(&mut events).await;
    assert!(!report.committed && report.frozen_again, "{report:?}");
    assert_eq!(refused(link.renew(LONG).await), RefusalCode::FreezeBroken);
    link.freeze(LONG).await.unwrap();
    link.commit_freeze().await.unwrap();
    Group::open(&group).unwrap().thaw().unwrap();
    until("the group to be frozen again", || {
        std::fs::read_to_string(group.join("cgroup.events")).is_ok_and(|text| text.contains("frozen 1"))
    })
    .await;
    bed.comes_to_rest(&THREE_FILES).await;
}

#[tokio::test]
async fn a_peer_of_the_first_build_gets_no_event_that_it_cannot_read() {
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    let bed = two_writers(FreezerSetting::Signals);
    let (launched, link, mut events) = bed.launch().await;
    let mut old = tokio::net::UnixStream::connect(&bed.spec.socket).await.unwrap();
    old.write_all(b"{\"hello\":{\"version\":1}}\n").await.unwrap();
    let mut lines = BufReader::new(old).lines();
    assert!(lines.next_line().await.unwrap().unwrap().contains("hello"));
    link.freeze(LONG).await.unwrap();
    process::signal(launched.agent, libc::SIGCONT).unwrap();
    broken(&mut events).await;
    link.kill().await.unwrap();
    let next = lines.next_line().await.unwrap().unwrap();
    assert!(next.contains("exited"), "{next}");
}

/// A shell that saw its child die and continued would write its line.
const GOES_ON: &str = "
    sh -c 'sleep 1000; echo went on > far; exec sleep 1000' &
    setsid sh -c 'sleep 1000; echo went on > orphan; exec sleep 1000' &
    touch ready; sleep 1000; echo went on > near; exit 0";

async fn ready(bed: &Bed) {
    // Three shells, each of which waits for its sleep.
    until("every process to sleep", || bed.path("ready").exists() && bed.living().len() >= 6).await;
}

async fn a_shell_does_not_go_on_with_its_script_when_its_child_is_killed(mechanism: FreezerSetting) {
    for _ in 0..5 {
        let bed = Bed::new(mechanism, GOES_ON);
        let (_, link, mut events) = bed.launch().await;
        ready(&bed).await;
        link.kill().await.unwrap();
        let exit = exited(&mut events).await;
        assert_eq!((exit.code, exit.signal), (None, Some(libc::SIGKILL)), "{exit:?}");
        for name in THREE_FILES {
            assert!(!bed.path(name).exists(), "the shell of {name} saw the death of its child and went on");
        }
        assert_eq!(bed.living(), [] as [i32; 0]);
    }
}

async fn a_shell_does_not_go_on_with_its_script_when_its_child_is_killed_with_a_frozen_tree(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, GOES_ON);
    let (_, link, mut events) = bed.launch().await;
    ready(&bed).await;
    link.quiesce(Duration::from_millis(10), LONG).await.unwrap();
    link.freeze(LONG).await.unwrap();
    link.kill().await.unwrap();
    let exit = exited(&mut events).await;
    assert_eq!((exit.code, exit.signal), (None, Some(libc::SIGKILL)), "{exit:?}");
    assert!(THREE_FILES.iter().all(|name| !bed.path(name).exists()));
    assert_eq!(bed.living(), [] as [i32; 0]);
}

async fn leftovers_do_not_go_on_with_their_scripts(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, GOES_ON);
    let (launched, _link, mut events) = bed.launch().await;
    ready(&bed).await;
    assert!(process::signal(launched.agent, libc::SIGKILL).unwrap());
    let exit = exited(&mut events).await;
    assert_eq!(exit.signal, Some(libc::SIGKILL));
    assert!(exit.leftovers_killed >= 4, "{exit:?}");
    assert!(THREE_FILES.iter().all(|name| !bed.path(name).exists()));
    assert_eq!(bed.living(), [] as [i32; 0]);
}

async fn a_forking_tree_is_killed_completely(mechanism: FreezerSetting) {
    let script = r#"
        loop() { while :; do (: ; echo y >> $1) & done; }
        loop b1 & loop b2 &
        setsid sh -c 'while :; do (setsid sh -c "echo x >> b3" & ) ; done' &
        wait
    "#;
    let bed = Bed::new(mechanism, script);
    let (_, link, mut events) = bed.launch().await;
    bed.growing(&["b1", "b2", "b3"]).await;
    link.kill().await.unwrap();
    let exit = exited(&mut events).await;
    assert_eq!(exit.signal, Some(libc::SIGKILL));
    assert_eq!(bed.living(), [] as [i32; 0]);
    bed.unchanged(&["b1", "b2", "b3"]).await;
}

async fn a_job_in_a_session_of_its_own_ignores_sigtstp_and_is_frozen_all_the_same(mechanism: FreezerSetting) {
    // The group of `far` and of `orphan` is orphaned: the default action of SIGTSTP is ignored there, and SIGTSTP is
    // sent to the main process's group only.
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (_, link, _events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    assert_eq!(link.quiesce(LONG, LONG).await.unwrap().outcome, QuiesceOutcome::Stopped);
    bed.growing(&["far", "orphan"]).await;
    link.freeze(LONG).await.unwrap();
    bed.still(&THREE_FILES).await;
    link.thaw().await.unwrap();
    bed.growing(&THREE_FILES).await;
}

async fn a_parent_in_vfork_counts_as_stopped(mechanism: FreezerSetting) {
    // The child of a vfork that was stopped before it could call exec keeps its parent waiting, in a state that no
    // signal changes.
    let mut bed = Bed::new(mechanism, "");
    let code = "import ctypes, os, signal\n\
        libc = ctypes.CDLL(None)\n\
        pid = libc.vfork()\n\
        if pid == 0:\n    os.kill(os.getpid(), signal.SIGSTOP); os._exit(0)\n\
        open('after', 'w').close()\n\
        signal.pause()\n";
    bed.spec.argv = ["python3", "-c", code].into_iter().map(Into::into).collect();
    if std::process::Command::new("python3").arg("-V").output().is_err() {
        // No other available program calls vfork and waits.
        eprintln!("skipped: there is no python3 to call vfork with");
        return;
    }
    let (launched, link, mut events) = bed.launch().await;
    until("the parent to wait in vfork", || {
        let children = process::descendants(launched.agent.pid, process::ProcScan::Quick).unwrap();
        let waits = process::stat_of(launched.agent).unwrap().is_some_and(|stat| stat.letter == b'D');
        waits && children.iter().any(|child| child.state() == RunState::Stopped)
    })
    .await;
    let outcome = link.quiesce(LONG, LONG).await.unwrap().outcome;
    assert_eq!(outcome, QuiesceOutcome::AlreadyStopped);
    link.freeze(LONG).await.unwrap();
    link.renew(LONG).await.unwrap();
    link.commit_freeze().await.unwrap();
    link.kill().await.unwrap();
    assert_eq!(exited(&mut events).await.signal, Some(libc::SIGKILL));
    assert!(!bed.path("after").exists());
}

async fn an_agent_that_dies_between_its_steps_is_answered(mechanism: FreezerSetting) {
    // After the quiesce, after the freeze, after the commit.
    for died_after in 0..3 {
        let bed = Bed::new(mechanism, THREE_WRITERS);
        let (launched, link, mut events) = bed.launch().await;
        bed.growing(&["near"]).await;
        link.quiesce(LONG, LONG).await.unwrap();
        if died_after > 0 {
            link.freeze(LONG).await.unwrap();
        }
        if died_after > 1 {
            link.commit_freeze().await.unwrap();
        }
        assert!(process::signal(launched.agent, libc::SIGKILL).unwrap());
        let exit = exited(&mut events).await;
        assert_eq!(exit.signal, Some(libc::SIGKILL));
        match link.freeze(LONG).await {
            Err(LinkError::Closed | LinkError::Refused { code: RefusalCode::Ending, .. }) => {}
            other => panic!("{other:?}"),
        }
        assert_eq!(bed.living(), [] as [i32; 0]);
    }
}

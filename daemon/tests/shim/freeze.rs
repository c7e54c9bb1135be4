//! Freezing, leases and quiescing, with both mechanisms and real trees.

use std::time::Duration;

use crate::bed::{Bed, LONG, THREE_FILES, THREE_WRITERS, exited, next, one_writer, until};
use fermata_daemon::shims::link::LinkError;
use fermata_os::cgroup::FreezerSetting;
use fermata_os::process::{self, RunState};
use fermata_protocol::pause::FreezerKind;
use fermata_shim::wire::{QuiesceOutcome, RefusalCode, ShimEvent, TreeState};

for_both_mechanisms!(
    a_freeze_stops_the_whole_tree_and_a_thaw_continues_it,
    a_lease_that_is_not_renewed_thaws_without_a_daemon,
    a_renewed_lease_lasts_and_a_committed_freeze_outlives_the_connection,
    a_kill_while_frozen_ends_every_process_before_it_runs_again,
    a_frozen_agent_can_be_stopped,
    an_agent_killed_from_outside_while_frozen_is_still_recorded,
    quiesce_stops_an_agent_that_obeys_and_thaw_continues_it,
    quiesce_waits_for_the_whole_grace_of_an_agent_that_ignores_it,
    quiesce_waits_for_a_handler_that_saves_and_stops,
    an_agent_that_was_stopped_before_stays_stopped_after_the_thaw,
    a_quiesce_without_a_freeze_is_undone_by_its_lease,
    a_second_freeze_answers_the_same_and_a_thaw_may_come_twice,
    a_forking_tree_is_frozen_completely,
    an_agent_that_ends_while_quiescing_is_answered,
    a_tree_of_which_a_part_runs_is_not_taken_for_frozen,
);

fn refused(result: Result<impl std::fmt::Debug, LinkError>) -> RefusalCode {
    match result {
        Err(LinkError::Refused { code, .. }) => code,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

async fn a_freeze_stops_the_whole_tree_and_a_thaw_continues_it(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (launched, link, _events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    let frozen = link.freeze(LONG).await.unwrap();
    bed.still(&THREE_FILES).await;
    assert_eq!(frozen.mechanism, launched.mechanism);
    assert!(frozen.processes >= 3, "{frozen:?}");
    if mechanism == FreezerSetting::Signals {
        assert_eq!(frozen.mechanism, FreezerKind::Signals);
        assert!(launched.why.is_some());
    }
    let status = link.status().await.unwrap();
    assert_eq!((status.state, status.committed), (TreeState::Frozen, false));
    assert!(status.lease_remaining_ms.unwrap() <= LONG.as_millis() as u64);
    link.thaw().await.unwrap();
    bed.growing(&THREE_FILES).await;
    assert_eq!(link.status().await.unwrap().state, TreeState::Running);
}

async fn a_lease_that_is_not_renewed_thaws_without_a_daemon(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (_, link, mut events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    link.freeze(LONG).await.unwrap();
    bed.still(&THREE_FILES).await;
    link.renew(Duration::from_millis(50)).await.unwrap();
    assert_eq!(next(&mut events).await, Some(ShimEvent::LeaseExpired {}));
    assert_eq!(refused(link.commit_freeze().await), RefusalCode::NotFrozen);

    link.freeze(LONG).await.unwrap();
    link.renew(Duration::from_millis(300)).await.unwrap();
    link.close();
    link.closed().await;
    bed.growing(&THREE_FILES).await;
}

async fn a_renewed_lease_lasts_and_a_committed_freeze_outlives_the_connection(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (_, link, _events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    link.freeze(LONG / 2).await.unwrap();
    link.renew(LONG * 2).await.unwrap();
    assert!(link.status().await.unwrap().lease_remaining_ms.unwrap() > LONG.as_millis() as u64);
    link.renew(LONG).await.unwrap();
    link.commit_freeze().await.unwrap();
    link.close();
    link.closed().await;
    bed.still(&THREE_FILES).await;
    let (link, _events) = bed.connect().await;
    let status = link.status().await.unwrap();
    assert_eq!((status.state, status.committed, status.lease_remaining_ms), (TreeState::Frozen, true, None));
    link.thaw().await.unwrap();
    bed.growing(&THREE_FILES).await;
}

async fn a_kill_while_frozen_ends_every_process_before_it_runs_again(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (_, link, mut events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    link.freeze(LONG).await.unwrap();
    link.commit_freeze().await.unwrap();
    let before = THREE_FILES.map(|name| bed.size(name));
    link.kill().await.unwrap();
    let exit = exited(&mut events).await;
    assert_eq!((exit.code, exit.signal), (None, Some(libc::SIGKILL)));
    assert!(exit.leftovers_killed >= 2, "{exit:?}");
    assert_eq!(before, THREE_FILES.map(|name| bed.size(name)));
    assert_eq!(bed.living(), [] as [i32; 0]);
    assert_eq!(bed.exit(), Some(exit));
    if let Some(group) = bed.run().cgroup {
        assert!(!group.exists(), "{} is left", group.display());
    }
}

async fn a_frozen_agent_can_be_stopped(mechanism: FreezerSetting) {
    let mut bed = Bed::new(mechanism, "");
    bed.spec.argv = one_writer("$SIG{TERM} = sub { print \"bye\\n\"; exit 7 };");
    let (_, link, mut events) = bed.launch().await;
    bed.growing(&["near"]).await;
    link.freeze(LONG).await.unwrap();
    link.commit_freeze().await.unwrap();
    link.stop(Some(LONG)).await.unwrap();
    let exit = exited(&mut events).await;
    assert_eq!((exit.code, exit.signal), (Some(7), None));
    assert_eq!(bed.logs().last().unwrap().bytes, b"bye");
}

async fn an_agent_killed_from_outside_while_frozen_is_still_recorded(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (launched, link, mut events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    link.freeze(LONG).await.unwrap();
    link.commit_freeze().await.unwrap();
    assert!(process::signal(launched.agent, libc::SIGKILL).unwrap());
    let exit = exited(&mut events).await;
    assert_eq!(exit.signal, Some(libc::SIGKILL));
    assert_eq!(bed.living(), [] as [i32; 0]);
}

async fn quiesce_stops_an_agent_that_obeys_and_thaw_continues_it(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "while :; do echo x >> near; sleep 0.01; done");
    let (_, link, mut events) = bed.launch().await;
    bed.growing(&["near"]).await;
    let quiesced = link.quiesce(LONG, LONG).await.unwrap();
    assert_eq!(quiesced.outcome, QuiesceOutcome::Stopped);
    assert_eq!(link.status().await.unwrap().state, TreeState::Stopped);
    link.freeze(LONG).await.unwrap();
    bed.still(&["near"]).await;
    link.thaw().await.unwrap();
    bed.growing(&["near"]).await;
    assert!(events.try_recv().is_err(), "the shim's own stop was reported as that of another process");
}

async fn quiesce_waits_for_the_whole_grace_of_an_agent_that_ignores_it(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "trap '' TSTP; while :; do echo x >> near; sleep 0.01; done");
    let (_, link, _events) = bed.launch().await;
    bed.growing(&["near"]).await;
    let quiesced = link.quiesce(Duration::from_millis(250), LONG).await.unwrap();
    assert_eq!(quiesced.outcome, QuiesceOutcome::Ignored);
    assert!(quiesced.waited_ms >= 250, "{quiesced:?}");
    link.freeze(LONG).await.unwrap();
    bed.still(&["near"]).await;
    link.thaw().await.unwrap();
    bed.growing(&["near"]).await;
}

async fn quiesce_waits_for_a_handler_that_saves_and_stops(mechanism: FreezerSetting) {
    let mut bed = Bed::new(mechanism, "");
    bed.spec.argv = one_writer(
        "$SIG{TSTP} = sub { note('state', 'saved '); kill 'STOP', $$ };
        $SIG{CONT} = sub { note('state', 'back') };",
    );
    let (_, link, _events) = bed.launch().await;
    bed.growing(&["near"]).await;
    assert_eq!(link.quiesce(LONG, LONG).await.unwrap().outcome, QuiesceOutcome::Stopped);
    assert_eq!(std::fs::read_to_string(bed.path("state")).unwrap(), "saved ");
    link.freeze(LONG).await.unwrap();
    link.thaw().await.unwrap();
    until("the handler of SIGCONT", || {
        std::fs::read_to_string(bed.path("state")).is_ok_and(|text| text == "saved back")
    })
    .await;
}

async fn an_agent_that_was_stopped_before_stays_stopped_after_the_thaw(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (launched, link, mut events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    assert!(process::signal(launched.agent, libc::SIGSTOP).unwrap());
    assert_eq!(next(&mut events).await, Some(ShimEvent::Stopped { signal: libc::SIGSTOP }));
    let quiesced = link.quiesce(LONG, LONG).await.unwrap();
    assert_eq!(quiesced.outcome, QuiesceOutcome::AlreadyStopped);
    link.freeze(LONG).await.unwrap();
    bed.still(&THREE_FILES).await;
    let refused = link.signal(libc::SIGCONT).await;
    assert!(matches!(refused, Err(LinkError::Refused { code: RefusalCode::AgentFrozen, .. })), "{refused:?}");
    bed.still(&THREE_FILES).await;
    link.thaw().await.unwrap();
    bed.growing(&["far", "orphan"]).await;
    bed.unchanged(&["near"]).await;
    assert_eq!(process::stat_of(launched.agent).unwrap().unwrap().state(), RunState::Stopped);
    assert_eq!(link.status().await.unwrap().state, TreeState::Stopped);
    link.signal(libc::SIGCONT).await.unwrap();
    assert_eq!(next(&mut events).await, Some(ShimEvent::Continued {}));
    bed.growing(&["near"]).await;
}

async fn a_quiesce_without_a_freeze_is_undone_by_its_lease(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, "while :; do echo x >> near; sleep 0.01; done");
    let (_, link, mut events) = bed.launch().await;
    bed.growing(&["near"]).await;
    link.quiesce(LONG, Duration::from_millis(100)).await.unwrap();
    assert_eq!(next(&mut events).await, Some(ShimEvent::LeaseExpired {}));
    bed.growing(&["near"]).await;
}

async fn a_second_freeze_answers_the_same_and_a_thaw_may_come_twice(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (_, link, _events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    link.thaw().await.unwrap();
    let first = link.freeze(LONG).await.unwrap();
    let second = link.freeze(LONG).await.unwrap();
    assert_eq!(first.processes, second.processes);
    assert_eq!(refused(link.quiesce(LONG, LONG).await), RefusalCode::AlreadyFrozen);
    link.thaw().await.unwrap();
    link.thaw().await.unwrap();
    assert_eq!(refused(link.renew(LONG).await), RefusalCode::NotFrozen);
    bed.growing(&THREE_FILES).await;
}

async fn a_forking_tree_is_frozen_completely(mechanism: FreezerSetting) {
    // Eight loops that fork without a pause, half of them in another session, and orphans that fork as well.
    let script = r#"
        loop() { while :; do (echo x >> $1; (: ; echo y >> $1) & ) ; done; }
        loop b1 & loop b2 & loop b3 &
        setsid sh -c 'while :; do (echo x >> b4; (: ; echo y >> b4) & ) ; done' &
        setsid sh -c 'while :; do (setsid sh -c "echo x >> b5" & ) ; done' &
        wait
    "#;
    let files = ["b1", "b2", "b3", "b4", "b5"];
    let bed = Bed::new(mechanism, script);
    let (_, link, mut events) = bed.launch().await;
    for _ in 0..3 {
        bed.growing(&files).await;
        link.freeze(LONG).await.unwrap();
        bed.still(&files).await;
        link.thaw().await.unwrap();
    }
    bed.growing(&files).await;
    link.freeze(LONG).await.unwrap();
    link.kill().await.unwrap();
    exited(&mut events).await;
    assert_eq!(bed.living(), [] as [i32; 0]);
}

async fn an_agent_that_ends_while_quiescing_is_answered(mechanism: FreezerSetting) {
    let mut bed = Bed::new(mechanism, "");
    bed.spec.argv = one_writer("$SIG{TSTP} = sub { exit 4 };");
    let (_, link, mut events) = bed.launch().await;
    bed.growing(&["near"]).await;
    let quiesced = link.quiesce(LONG, LONG).await.unwrap();
    assert_eq!(quiesced.outcome, QuiesceOutcome::Exited);
    assert_eq!(exited(&mut events).await.code, Some(4));
}

/// The check that the other tests rely on can fail.
async fn a_tree_of_which_a_part_runs_is_not_taken_for_frozen(mechanism: FreezerSetting) {
    let bed = Bed::new(mechanism, THREE_WRITERS);
    let (launched, link, _events) = bed.launch().await;
    bed.growing(&THREE_FILES).await;
    assert!(bed.at_large().iter().any(|(pid, _)| *pid == launched.agent.pid), "all run");
    assert!(process::signal(launched.agent, libc::SIGSTOP).unwrap());
    until("the main process to stop", || {
        process::stat_of(launched.agent).unwrap().is_some_and(|stat| stat.state() == RunState::Stopped)
    })
    .await;
    let at_large = bed.at_large();
    assert!(at_large.iter().all(|(pid, _)| *pid != launched.agent.pid) && at_large.len() >= 2, "{at_large:?}");
    link.freeze(LONG).await.unwrap();
    assert_eq!(bed.at_large(), []);
}

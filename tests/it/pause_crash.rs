//! A pause whose daemon dies, fails or is stopped at any instant: afterwards the project is active or paused, never in
//! between, and no agent stays frozen without a daemon.

use fermata_protocol::agent::AgentStatus;
use fermata_protocol::operation::{OperationKind, OperationState};
use fermata_protocol::pause::{PauseMode, ResumeMethod};
use fermata_protocol::project::ProjectStatus;
use fermata_tests::waiting::{SOON, wait_until};
use fermata_tests::{Sandbox, process};
use nix::sys::signal::Signal;

use crate::scene::*;

const FAILPOINT: &str = "FERMATA_FAILPOINT";

fn bed(freezer: &str, failpoint: &str) -> Sandbox {
    let config = format!("{}grace_ms = 50\n{freezer}", short_lease());
    Sandbox::builder().config(&config).env(FAILPOINT, failpoint).start()
}

/// Starts an agent with context to archive and an older checkpoint.
fn start(sandbox: &Sandbox) -> Ticker {
    let ticker = Ticker::start(sandbox);
    fill_context(sandbox);
    assert_eq!(checkpoint(sandbox).id, 1);
    sandbox.workspace("web").write("src/lib.rs", "//! Changed since.\n");
    ticker
}

/// The state of a project after a crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum After {
    /// The pause was not committed.
    Active,
    /// The pause was committed; the freeze may have been made permanent or not.
    Paused,
    /// The pause was committed and the freeze made permanent.
    Held,
}

fn crash(freezer: &str, failpoint: &str, mode: PauseMode, after: After) {
    let mut sandbox = bed(freezer, failpoint);
    let ticker = start(&sandbox);
    let pid = the_agent(&sandbox).pid.expect("it runs");

    let answer = pause_at_risk(&sandbox, mode);
    assert!(answer.is_err(), "the daemon was to die at {failpoint}: {answer:?}");
    wait_until(SOON, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));

    // Without a daemon the lease ends the freeze. The wait takes seconds, so it is done with one freezer only; with
    // the other one, the new daemon finds a lease that has not ended.
    match after {
        After::Active | After::Paused if freezer == BY_SIGNALS => ticker.runs(SOON),
        After::Active | After::Paused => {}
        After::Held => ticker.stands_still(),
    }

    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    let shown = settled(&sandbox);
    let pauses: Vec<_> = operations(&sandbox).into_iter().filter(|o| o.kind == OperationKind::Pause).collect();
    match after {
        After::Active => {
            assert!(pauses.iter().all(|pause| pause.state == OperationState::Failed), "{pauses:?}");
            assert_eq!(the_agent(&sandbox).pid, Some(pid));
            is_untouched(&sandbox, &ticker, &[1]);
            let again = pause(&sandbox, PauseMode::Freeze).expect("pause after a crash");
            ticker.stands_still();
            only_these_are_left(&sandbox, &[1, again.checkpoint_id]);
        }
        After::Paused | After::Held => {
            assert_eq!(shown.project.status, ProjectStatus::Paused);
            assert!(pauses.iter().all(|pause| pause.state == OperationState::Succeeded), "{pauses:?}");
            only_these_are_left(&sandbox, &[1, 2]);
            assert!(archived(&sandbox) > 0);
        }
    }
    if mode == PauseMode::Freeze {
        assert!(is_frozen(pid));
        assert_eq!(the_agent(&sandbox).pid, Some(pid));
    } else if after != After::Active {
        wait_until(SOON, "the parked agent to be gone", || !process::is_alive(pid));
        assert_eq!(the_agent(&sandbox).pid, None);
    }
    assert_eq!(the_agent(&sandbox).status, AgentStatus::Paused);
    ticker.stands_still();
    all_verify(&sandbox);
    let resumed = resume(&sandbox).expect("resume");
    let rung = if mode == PauseMode::Freeze || after == After::Active {
        ResumeMethod::Thawed
    } else {
        ResumeMethod::Respawned
    };
    assert_eq!(resumed.agents.iter().map(|agent| agent.method).collect::<Vec<_>>(), [rung], "{resumed:?}");
    ticker.runs(SOON);
}

/// One test per instant, so that they run in parallel.
macro_rules! crashes {
    ($($name:ident: $failpoint:literal, $mode:ident, $after:ident;)*) => {
        $(mod $name {
            use super::*;

            #[test]
            fn a_daemon_that_dies_here_leaves_nothing_half_done_in_a_group() {
                crash(BY_GROUP, $failpoint, PauseMode::$mode, After::$after);
            }

            #[test]
            fn a_daemon_that_dies_here_leaves_nothing_half_done_by_signals() {
                crash(BY_SIGNALS, $failpoint, PauseMode::$mode, After::$after);
            }
        })*
    };
}

// `start` has made a checkpoint, which passes these failpoints for the first time.
crashes! {
    at_started: "pause.started=abort", Freeze, Active;
    at_validate: "pause.validate@2=abort", Freeze, Active;
    at_quiesce: "pause.quiesce=abort", Freeze, Active;
    at_quiesced: "pause.quiesced=abort", Freeze, Active;
    at_plan_flash_save: "pause.plan_flash_save=abort", Freeze, Active;
    at_stage: "checkpoint.stage=abort", Freeze, Active;
    at_staged: "checkpoint.staged=abort", Freeze, Active;
    at_checkpoint_begin: "checkpoint.begin@2=abort", Freeze, Active;
    at_pack_written: "history.pack.written@2=abort", Freeze, Active;
    at_captured: "checkpoint.captured@2=abort", Freeze, Active;
    at_placed: "checkpoint.placed@2=abort", Freeze, Active;
    at_pack_moved: "history.pack.moved@3=abort", Freeze, Active;
    at_index_moved: "history.pack.moved@4=abort", Freeze, Active;
    at_ref_before: "history.ref.before@2=abort", Freeze, Active;
    at_ref_created: "history.ref.created@2=abort", Freeze, Active;
    at_sealed: "checkpoint.sealed@2=abort", Freeze, Active;
    at_commit: "pause.commit=abort", Freeze, Active;
    at_undoing: "checkpoint.sealed@2=error,pause.undoing=abort", Freeze, Active;
    at_undo_thaw: "checkpoint.sealed@2=error,undo.thaw=abort", Freeze, Active;
    at_undo_discard: "checkpoint.sealed@2=error,undo.discard=abort", Freeze, Active;
    at_undone: "checkpoint.sealed@2=error,pause.undone=abort", Freeze, Active;
    at_committed: "pause.committed=abort", Freeze, Paused;
    at_held: "pause.held=abort", Freeze, Held;
    at_committed_to_park: "pause.committed=abort", Park, Paused;
    at_held_to_park: "pause.held=abort", Park, Held;
    at_parked: "pause.parked=abort", Park, Held;
    at_commit_to_park: "pause.commit=abort", Park, Active;
}

// Where a live checkpoint freezes, it passes these failpoints too.
mod at_freeze {
    use super::*;

    #[test]
    fn a_daemon_that_dies_here_leaves_nothing_half_done_in_a_group() {
        crash(BY_GROUP, "pause.freeze@2=abort", PauseMode::Freeze, After::Active);
    }

    #[test]
    fn a_daemon_that_dies_here_leaves_nothing_half_done_by_signals() {
        crash(BY_SIGNALS, "pause.freeze=abort", PauseMode::Freeze, After::Active);
    }
}

mod at_frozen {
    use super::*;

    #[test]
    fn a_daemon_that_dies_here_leaves_nothing_half_done_in_a_group() {
        crash(BY_GROUP, "pause.frozen@2=abort", PauseMode::Freeze, After::Active);
    }

    #[test]
    fn a_daemon_that_dies_here_leaves_nothing_half_done_by_signals() {
        crash(BY_SIGNALS, "pause.frozen=abort", PauseMode::Freeze, After::Active);
    }
}

/// Pauses with an injected error and asserts that nothing is left; then pauses without one.
fn fails_cleanly(freezer: &str, failpoint: &str) {
    let sandbox = bed(freezer, failpoint);
    let ticker = start(&sandbox);
    let refusal = pause(&sandbox, PauseMode::Freeze).expect_err(failpoint);
    is_failure(&refusal);
    assert!(refusal.message.contains("failpoint"), "the cause is missing: {refusal:?}");
    is_untouched(&sandbox, &ticker, &[1]);
    let again = pause(&sandbox, PauseMode::Freeze).expect("pause after a failed one");
    ticker.stands_still();
    only_these_are_left(&sandbox, &[1, again.checkpoint_id]);
    assert!(archived(&sandbox) > 0);
    all_verify(&sandbox);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

macro_rules! errors {
    ($($name:ident: $failpoint:literal;)*) => {
        $(mod $name {
            use super::*;

            #[test]
            fn a_pause_that_fails_here_is_undone_in_a_group() {
                fails_cleanly(BY_GROUP, $failpoint);
            }

            #[test]
            fn a_pause_that_fails_here_is_undone_by_signals() {
                // A checkpoint that does not freeze does not pass these.
                let failpoint = $failpoint.replace("freeze@2", "freeze").replace("frozen@2", "frozen");
                fails_cleanly(BY_SIGNALS, &failpoint);
            }
        })*
    };
}

errors! {
    error_at_validate: "pause.validate@2=error";
    error_at_quiesce: "pause.quiesce=error";
    error_at_quiesced: "pause.quiesced=error";
    error_at_freeze: "pause.freeze@2=error";
    error_at_frozen: "pause.frozen@2=error";
    error_at_plan_flash_save: "pause.plan_flash_save=error";
    error_at_checkpoint_begin: "checkpoint.begin@2=error";
    error_at_pack_written: "history.pack.written@2=error";
    error_at_captured: "checkpoint.captured@2=error";
    error_at_placed: "checkpoint.placed@2=error";
    error_at_pack_moved: "history.pack.moved@3=error";
    error_at_index_moved: "history.pack.moved@4=error";
    error_at_ref_before: "history.ref.before@2=error";
    error_at_sealed: "checkpoint.sealed@2=error";
    error_at_commit: "pause.commit=error";
    error_while_undoing: "checkpoint.sealed@2=error,undo.thaw=error,undo.discard=error,pause.undone=error";
}

// Failpoints before the commit: a daemon that continues after the end of the lease must not commit.
macro_rules! stands_still {
    ($($name:ident: $in_a_group:literal, $by_signals:literal;)*) => {
        $(mod $name {
            use super::*;

            #[test]
            fn agents_of_a_daemon_that_stands_still_here_run_again_within_the_lease_in_a_group() {
                stands_still_in_mid_pause(BY_GROUP, $in_a_group);
            }

            #[test]
            fn agents_of_a_daemon_that_stands_still_here_run_again_within_the_lease_by_signals() {
                stands_still_in_mid_pause(BY_SIGNALS, $by_signals);
            }
        })*
    };
}

stands_still! {
    still_at_quiesced: "pause.quiesced=stop", "pause.quiesced=stop";
    still_at_frozen: "pause.frozen@2=stop", "pause.frozen=stop";
    still_at_plan_flash_save: "pause.plan_flash_save=stop", "pause.plan_flash_save=stop";
    still_at_checkpoint_begin: "checkpoint.begin@2=stop", "checkpoint.begin@2=stop";
    still_at_captured: "checkpoint.captured@2=stop", "checkpoint.captured@2=stop";
    still_at_ref_before: "history.ref.before@2=stop", "history.ref.before@2=stop";
    still_at_sealed: "checkpoint.sealed@2=stop", "checkpoint.sealed@2=stop";
    // After the check that no agent has run.
    still_at_commit: "pause.commit=stop", "pause.commit=stop";
}

fn stands_still_in_mid_pause(freezer: &str, failpoint: &str) {
    let sandbox = bed(freezer, failpoint);
    let ticker = start(&sandbox);
    let refusal = std::thread::scope(|scope| {
        let pausing = scope.spawn(|| pause(&sandbox, PauseMode::Freeze));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        ticker.runs(SOON);
        sandbox.signal_daemon(Signal::SIGCONT);
        pausing.join().expect("an answer")
    });
    // Before the freeze the lease is that of the quiesce, and the freeze replaces it.
    if failpoint.starts_with("pause.quiesced") {
        refusal.expect("a pause that has not frozen an agent yet continues");
    } else {
        is_failure(&refusal.expect_err("a freeze that has ended proves nothing"));
        settled(&sandbox);
        is_untouched(&sandbox, &ticker, &[1]);
        pause(&sandbox, PauseMode::Freeze).expect("pause after a failed one");
    }
    ticker.stands_still();
}

/// The daemon is stopped after the commit and before the freeze is made permanent: the project stays paused, with a
/// warning that agents ran.
fn stopped_before_the_freeze_is_permanent(freezer: &str) {
    let sandbox = bed(freezer, "pause.committed=stop");
    let ticker = start(&sandbox);
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| pause(&sandbox, PauseMode::Freeze));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        ticker.runs(SOON);
        sandbox.signal_daemon(Signal::SIGCONT);
        pausing.join().expect("an answer").expect("it was committed");
    });
    ticker.stands_still();
    let warnings = || show(&sandbox).project.pause.expect("it is paused").warnings;
    wait_until(SOON, "the warning about the broken freeze", || {
        warnings().iter().any(|text| text.contains("ran for a moment"))
    });
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn agents_that_ran_after_the_commit_are_frozen_again_with_a_warning_in_a_group() {
    stopped_before_the_freeze_is_permanent(BY_GROUP);
}

#[test]
fn agents_that_ran_after_the_commit_are_frozen_again_with_a_warning_by_signals() {
    stopped_before_the_freeze_is_permanent(BY_SIGNALS);
}

#[test]
fn a_daemon_that_receives_sigterm_in_mid_pause_undoes_it_first() {
    let mut sandbox = bed(BY_GROUP, "");
    let ticker = Ticker::running(&sandbox, "web", "worker", &format!("trap '' TSTP; {TICK}"));
    let answer = std::thread::scope(|scope| {
        let mut client = sandbox.rpc();
        let pausing = scope.spawn(move || {
            client.call(&fermata_protocol::pause::ProjectPause {
                project: web(),
                reason: None,
                mode: PauseMode::Freeze,
                grace_ms: Some(20_000),
            })
        });
        step_is(&sandbox, "quiesce");
        sandbox.signal_daemon(Signal::SIGTERM);
        pausing.join().expect("an answer or a broken connection")
    });
    assert!(answer.is_err(), "{answer:?}");
    sandbox.wait_for_daemon();
    ticker.runs(SOON);
    sandbox.start_daemon();
    settled(&sandbox);
    is_untouched(&sandbox, &ticker, &[]);
}

#[test]
fn two_crashes_in_a_row_during_the_undo_are_survived() {
    let mut sandbox = bed(BY_GROUP, "undo.thaw=abort,checkpoint.sealed@2=error");
    let ticker = start(&sandbox);
    pause_at_risk(&sandbox, PauseMode::Freeze).expect_err("the daemon was to die");
    wait_until(SOON, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));
    // The next daemon dies in its recovery, before or after it accepts connections.
    let died = sandbox.restart_to_its_death();
    assert!(!died.success());
    ticker.runs(SOON);
    sandbox.forget_env(FAILPOINT);
    sandbox.start_daemon();
    settled(&sandbox);
    is_untouched(&sandbox, &ticker, &[1]);
}

/// Kills the daemon in a resume: the next daemon brings the agent back exactly once.
fn crash_in_a_resume(failpoint: &str, mode: PauseMode) {
    let mut sandbox = bed(BY_GROUP, failpoint);
    let ticker = Ticker::start(&sandbox);
    let pid = the_agent(&sandbox).pid.expect("it runs");
    pause(&sandbox, mode).expect("pause");
    let answer = sandbox.rpc().call(&fermata_protocol::pause::ProjectResume {
        project: web(),
        checkpoint: None,
        over_budget: false,
    });
    assert!(answer.is_err(), "the daemon was to die at {failpoint}: {answer:?}");
    wait_until(SOON, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));
    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    let shown = settled(&sandbox);
    assert_eq!(shown.project.status, ProjectStatus::Active, "{shown:?}");
    ticker.runs(SOON);
    let agent = the_agent(&sandbox);
    assert_eq!(agent.status, AgentStatus::Running);
    if mode == PauseMode::Freeze {
        assert_eq!((agent.pid, agent.runs), (Some(pid), 1));
    }
    // Only one run is alive: another one would leave marks during the pause.
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    ticker.stands_still();
    all_verify(&sandbox);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn a_resume_whose_daemon_dies_goes_on_under_the_next_one() {
    for failpoint in ["resume.started", "resume.thawed", "resume.commit"] {
        crash_in_a_resume(&format!("{failpoint}=abort"), PauseMode::Freeze);
    }
}

#[test]
fn a_resume_of_a_parked_project_whose_daemon_dies_goes_on_under_the_next_one() {
    for failpoint in ["resume.started", "launch.before@2", "launch.after@2", "resume.commit"] {
        crash_in_a_resume(&format!("{failpoint}=abort"), PauseMode::Park);
    }
}

#[test]
fn a_resume_that_cannot_be_written_down_at_once_is_written_down_later() {
    let sandbox = bed(BY_GROUP, "resume.commit=error");
    let ticker = Ticker::start(&sandbox);
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    let resumed = resume(&sandbox).expect("resume");
    assert_eq!(resumed.agents.iter().map(|agent| agent.method).collect::<Vec<_>>(), [ResumeMethod::Thawed]);
    is_untouched(&sandbox, &ticker, &[1]);
}

#[test]
fn an_agent_whose_start_fails_late_does_not_run_on_unseen() {
    let sandbox = bed(BY_GROUP, "launch.after@2=error");
    let ticker = Ticker::start(&sandbox);
    pause(&sandbox, PauseMode::Park).expect("pause");
    let resumed = resume(&sandbox).expect("an answer");
    assert_eq!(
        resumed.agents.iter().map(|agent| agent.method).collect::<Vec<_>>(),
        [ResumeMethod::Failed],
        "{resumed:?}"
    );
    assert!(!resumed.success);
    ticker.stands_still();
    assert!(the_agent(&sandbox).status.is_terminal());
    assert_eq!(status(&sandbox), ProjectStatus::Failed);
}

#[test]
fn a_pause_that_is_cancelled_in_the_middle_of_its_checkpoint_leaves_nothing() {
    let sandbox = bed(BY_GROUP, "");
    let ticker = Ticker::start(&sandbox);
    let workspace = sandbox.workspace("web");
    for n in 0..2_000 {
        workspace.write(&format!("many/{}/{n}.txt", n % 10), format!("{n}\n"));
    }
    let (cancelled, answer) = std::thread::scope(|scope| {
        let pausing = scope.spawn(|| pause(&sandbox, PauseMode::Freeze));
        let operation = step_is(&sandbox, "checkpoint").id;
        let cancelled = sandbox.rpc().call(&fermata_protocol::operation::OperationCancel { operation_id: operation });
        (cancelled, pausing.join().expect("an answer"))
    });
    match refusal(cancelled) {
        Ok(operation) => {
            assert_eq!(operation.state, OperationState::Cancelled);
            assert_eq!(answer.expect_err("cancelled").code, fermata_protocol::Code::OperationCancelled);
            is_untouched(&sandbox, &ticker, &[]);
        }
        // The pause was faster than the test and succeeded.
        Err(_) => {
            let paused = answer.expect("it was not cancelled");
            ticker.stands_still();
            only_these_are_left(&sandbox, &[paused.checkpoint_id]);
        }
    }
}

#[test]
fn a_pause_whose_caller_goes_away_goes_on() {
    let sandbox = bed(BY_GROUP, "");
    let ticker = Ticker::running(&sandbox, "web", "worker", &format!("trap '' TSTP; {TICK}"));
    let mut caller = sandbox.ctl_command(&["pause", "web", "--grace", "500ms"]).spawn().expect("start fermatactl");
    step_is(&sandbox, "quiesce");
    caller.kill().expect("kill the caller");
    caller.wait().expect("reap the caller");
    let shown = settled(&sandbox);
    assert_eq!(shown.project.status, ProjectStatus::Paused);
    ticker.stands_still();
    only_these_are_left(&sandbox, &[1]);
}

#[test]
fn a_pause_that_was_committed_before_the_crash_answers_a_repeated_call() {
    let mut sandbox = bed(BY_GROUP, "pause.committed=abort");
    let ticker = Ticker::start(&sandbox);
    let call = |sandbox: &Sandbox| {
        let params = serde_json::json!({ "project": "web", "idempotency_key": "lunch-1" });
        let serde_json::Value::Object(params) = params else { unreachable!("it is one") };
        sandbox.rpc().call_raw("project.pause", params, |_| {})
    };
    call(&sandbox).expect_err("the daemon was to die");
    wait_until(SOON, "the daemon to die", || !process::is_alive(sandbox.daemon_pid()));
    sandbox.forget_env(FAILPOINT);
    sandbox.crash_and_restart();
    let answer = call(&sandbox).expect("the answer that got lost");
    assert_eq!((&answer["success"], &answer["checkpoint_id"]), (&true.into(), &1.into()), "{answer}");
    ticker.stands_still();
    only_these_are_left(&sandbox, &[1]);
}

#[test]
fn a_shim_that_dies_in_mid_pause_leaves_a_project_that_can_be_used() {
    let sandbox = bed(BY_GROUP, "checkpoint.captured=stop");
    let ticker = Ticker::running(&sandbox, "web", "worker", TICK);
    let other = Ticker::running(&sandbox, "web", "second", TICK);
    let agents = show(&sandbox).agents;
    let pid = agents.iter().find(|agent| agent.name == crate::scene::agent("worker")).and_then(|agent| agent.pid);
    let shim = process::parent(pid.expect("it runs")).expect("it has a parent");
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| pause(&sandbox, PauseMode::Freeze));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), Signal::SIGKILL).expect("kill the shim");
        wait_until(SOON, "the shim to die", || !process::is_alive(shim));
        sandbox.signal_daemon(Signal::SIGCONT);
        // With one agent less, or a failure.
        pausing.join().expect("an answer").ok();
    });
    let shown = settled(&sandbox);
    wait_until(SOON, "what the shim left to end", || !process::is_alive(pid.expect("it ran")));
    ticker.stands_still();
    match shown.project.status {
        ProjectStatus::Paused => {
            other.stands_still();
            resume(&sandbox).expect("the other is brought back");
        }
        status => assert_eq!(status, ProjectStatus::Active),
    }
    other.runs(SOON);
    wait_until(SOON, "the loss to be reported", || {
        show(&sandbox).agents.iter().any(|agent| agent.status == AgentStatus::Interrupted)
    });
    assert_eq!(status(&sandbox), ProjectStatus::Active);
}

#[test]
fn a_freeze_that_ends_early_is_reported_as_such_and_not_as_a_cancellation() {
    let sandbox = bed(BY_GROUP, "checkpoint.begin=stop");
    let ticker = Ticker::start(&sandbox);
    let workspace = sandbox.workspace("web");
    for n in 0..3_000 {
        workspace.write(&format!("many/{}/{n}.txt", n % 10), format!("{n}\n"));
    }
    let refusal = std::thread::scope(|scope| {
        let pausing = scope.spawn(|| pause(&sandbox, PauseMode::Freeze));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        ticker.runs(SOON);
        sandbox.signal_daemon(Signal::SIGCONT);
        pausing.join().expect("an answer").expect_err("a freeze that has ended proves nothing")
    });
    is_failure(&refusal);
    assert_eq!(operations(&sandbox)[0].state, OperationState::Failed);
    is_untouched(&sandbox, &ticker, &[]);
}

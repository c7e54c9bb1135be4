//! `project.pause`: its answer and events, the processes it stops, the part of agents in it, and who may pause when.

use std::fs;
use std::time::Instant;

use fermata_protocol::agent::{AgentAck, AgentListen};
use fermata_protocol::client::Client;
use fermata_protocol::operation::{OperationCancel, OperationState};
use fermata_protocol::pause::{FreezerKind, PauseMode, PauseResult, ProjectPause, ResumeMethod};
use fermata_protocol::project::ProjectStatus;
use fermata_protocol::{Code, Refusal};
use fermata_tests::waiting::{SOON, wait_for, wait_until};
use fermata_tests::{Sandbox, process};

use crate::scene::*;

fn bed(config: &str) -> Sandbox {
    Sandbox::builder().config(config).start()
}

/// Writes the agent's token where the test can read it.
const TELL_TOKEN: &str = "printf %s \"$FERMATA_TOKEN\" > \"$MARKS.token\"; ";

fn token(ticker: &Ticker) -> String {
    wait_for(SOON, "the agent's token", || ticker.text("token").filter(|text| !text.is_empty()))
}

/// A connection on which the agent waits for pause requests.
fn listening(sandbox: &Sandbox, ticker: &Ticker) -> Client {
    let mut client = as_agent(sandbox, &token(ticker));
    client.call(&AgentListen {}).expect("listen");
    client
}

#[test]
fn every_field_of_the_reply_says_what_has_happened() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::running(&sandbox, "web", "worker", TICK_EVERYWHERE);
    fill_context(&sandbox);
    let tree = process::tree(the_agent(&sandbox).pid.expect("it runs")).len() as u64;
    let tokens = show(&sandbox).context.tokens;
    let before = Instant::now();

    let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
    let whole = before.elapsed().as_secs_f64() * 1000.0;

    assert!(paused.success);
    let detail = show(&sandbox);
    assert_eq!(detail.project.status, ProjectStatus::Paused);
    let view = detail.project.pause.expect("it is paused");
    assert_eq!((&view.operation_id, view.checkpoint_id), (&paused.operation_id, paused.checkpoint_id));
    assert_eq!((view.paused_at, view.mode, view.mechanism), (paused.paused_at, paused.mode, paused.mechanism));
    assert_eq!(view.reason.as_deref(), Some("lunch"));
    assert_eq!(checkpoints(&sandbox), [paused.checkpoint_id]);
    assert_eq!(paused.tokens_before, tokens);
    assert_eq!(paused.tokens_after, detail.context.tokens);
    assert!(paused.tokens_after <= 100, "half of the limit of 200: {paused:?}");
    let reduction = 100.0 * (1.0 - paused.tokens_after as f64 / paused.tokens_before as f64);
    assert!((paused.reduction_percentage - reduction).abs() < 0.1, "{paused:?}");
    assert_eq!(paused.items_archived, archived(&sandbox) as u64);
    let summary = detail.context;
    assert_eq!((paused.hot_items_retained, paused.warm_items_retained), (summary.hot, summary.warm));
    assert_eq!(paused.items_archived + summary.hot + summary.warm + summary.cold, 10);
    assert!(paused.processes >= tree, "{} processes, but the tree has {tree}", paused.processes);
    assert!(paused.frozen_ms > 0.0 && paused.frozen_ms < whole, "{} of {whole}", paused.frozen_ms);
    let steps: Vec<&str> = paused.steps_ms.keys().map(String::as_str).collect();
    assert_eq!(steps, ["checkpoint", "freeze", "plan_flash_save", "quiesce", "validate"]);
    assert!(paused.steps_ms.values().sum::<f64>() < whole, "{:?} of {whole}", paused.steps_ms);
    assert_eq!(paused.warnings, Vec::<String>::new());
    ticker.stands_still();
    all_verify(&sandbox);

    let resumed = resume(&sandbox).expect("resume");
    assert!(resumed.success && resumed.paused_ms >= 0, "{resumed:?}");
    assert_eq!(resumed.agents.iter().map(|agent| agent.method).collect::<Vec<_>>(), [ResumeMethod::Thawed]);
    ticker.runs(SOON);
}

fn all_processes_stand_still(config: &str, mechanism: FreezerKind) {
    let sandbox = bed(config);
    let ticker = Ticker::running(&sandbox, "web", "worker", TICK_EVERYWHERE);
    let all = [ticker.clone(), ticker.beside("child"), ticker.beside("orphan")];
    all.iter().for_each(|one| one.runs(SOON));
    for _ in 0..2 {
        let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
        assert_eq!(paused.mechanism, mechanism);
        assert_eq!(the_agent(&sandbox).mechanism, Some(mechanism));
        all.iter().for_each(Ticker::stands_still);
        assert!(resume(&sandbox).expect("resume").success);
        all.iter().for_each(|one| one.runs(SOON));
    }
}

#[test]
fn grandchildren_in_sessions_of_their_own_stand_still_in_a_group() {
    all_processes_stand_still(BY_GROUP, FreezerKind::Cgroup);
}

#[test]
fn grandchildren_in_sessions_of_their_own_stand_still_by_signals() {
    all_processes_stand_still(BY_SIGNALS, FreezerKind::Signals);
}

/// A grace that ends only if the daemon waits for all of it: no machine is that slow.
const GRACE_MS: u64 = 60_000;

fn well_within_the_grace(paused: &PauseResult) -> bool {
    paused.steps_ms["quiesce"] < GRACE_MS as f64
}

/// Stops by itself at a good point after SIGTSTP, and acknowledges that.
const AT_A_GOOD_PLACE: &str = "exec perl -e '$| = 1; sub mark { open(my $f, \">>\", $_[0]); print $f \".\" } \
    $SIG{TSTP} = sub { mark(\"$ENV{MARKS}.good\"); kill STOP => $$ }; \
    while (1) { mark($ENV{MARKS}); select(undef, undef, undef, 0.02) }'";

fn an_agent_with_a_handler_stops_at_a_good_place(config: &str) {
    let sandbox = bed(config);
    let ticker = Ticker::running(&sandbox, "web", "worker", AT_A_GOOD_PLACE);
    for times in 1..=2 {
        let paused = pause_within(&sandbox, PauseMode::Freeze, Some(GRACE_MS)).expect("pause");
        assert!(well_within_the_grace(&paused), "it was waited for although it had stopped: {paused:?}");
        assert_eq!(ticker.beside("good").count(), times, "SIGTSTP reached it once per pause");
        ticker.stands_still();
        assert!(resume(&sandbox).expect("resume").success);
        ticker.runs(SOON);
    }
}

#[test]
fn an_agent_that_handles_sigtstp_stops_at_a_good_place_in_a_group() {
    an_agent_with_a_handler_stops_at_a_good_place(BY_GROUP);
}

#[test]
fn an_agent_that_handles_sigtstp_stops_at_a_good_place_by_signals() {
    an_agent_with_a_handler_stops_at_a_good_place(BY_SIGNALS);
}

fn an_agent_without_ears_is_frozen(config: &str) {
    let sandbox = bed(config);
    let ticker = Ticker::running(&sandbox, "web", "worker", &format!("trap '' TSTP; {TICK}"));
    let paused = pause_within(&sandbox, PauseMode::Freeze, Some(100)).expect("pause");
    assert!(paused.steps_ms["quiesce"] >= 90.0, "{paused:?}");
    ticker.stands_still();
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn an_agent_that_ignores_sigtstp_is_frozen_after_its_grace_in_a_group() {
    an_agent_without_ears_is_frozen(BY_GROUP);
}

#[test]
fn an_agent_that_ignores_sigtstp_is_frozen_after_its_grace_by_signals() {
    an_agent_without_ears_is_frozen(BY_SIGNALS);
}

/// Pauses while another function runs beside it.
fn pause_beside(sandbox: &Sandbox, grace_ms: u64, beside: impl FnOnce()) -> Result<PauseResult, Refusal> {
    std::thread::scope(|scope| {
        let pausing = scope.spawn(|| pause_within(sandbox, PauseMode::Freeze, Some(grace_ms)));
        beside();
        pausing.join().expect("the pause has an answer")
    })
}

#[test]
fn an_agent_that_acknowledges_is_frozen_at_once_and_not_signalled() {
    let sandbox = Sandbox::start();
    let script = format!("{TELL_TOKEN}{AT_A_GOOD_PLACE}");
    let ticker = Ticker::running(&sandbox, "web", "worker", &script);
    let mut channel = listening(&sandbox, &ticker);
    for _ in 0..2 {
        let paused = pause_beside(&sandbox, GRACE_MS, || {
            let asked = channel.next_notification().expect("a pause request");
            assert_eq!(asked.method, "pause_requested");
            assert_eq!(asked.params["reason"], "lunch");
            assert_eq!(asked.params["grace_ms"], GRACE_MS);
            ticker.runs(SOON);
            channel.call(&AgentAck::default()).expect("acknowledge");
        });
        let paused = paused.expect("pause");
        assert!(well_within_the_grace(&paused), "{paused:?}");
        assert_eq!(paused.warnings, Vec::<String>::new());
        assert_eq!(ticker.beside("good").count(), 0, "one that has acknowledged gets no SIGTSTP");
        ticker.stands_still();
        assert!(resume(&sandbox).expect("resume").success);
        ticker.runs(SOON);
    }
}

#[test]
fn an_agent_can_listen_and_acknowledge_by_the_command_line() {
    let sandbox = Sandbox::start();
    let ctl = fermata_tests::sandbox::binary("fermatactl");
    let script = format!(
        "'{0}' agent listen | while read -r line; do echo \"$line\" >> \"$MARKS.asked\"; '{0}' agent ack; done & {TICK}",
        ctl.display()
    );
    let ticker = Ticker::running(&sandbox, "web", "worker", &script);
    // A pause before the agent has begun to listen does not ask it.
    let listening = || {
        let paused = pause_within(&sandbox, PauseMode::Freeze, Some(GRACE_MS)).expect("pause");
        assert_eq!(paused.warnings, Vec::<String>::new());
        assert!(well_within_the_grace(&paused), "{paused:?}");
        ticker.stands_still();
        assert!(resume(&sandbox).expect("resume").success);
        ticker.beside("asked").count() > 0
    };
    wait_until(SOON, "the agent to be asked", listening);
    ticker.runs(SOON);
}

#[test]
fn an_agent_that_listens_and_never_acknowledges_is_frozen_with_a_warning() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::running(&sandbox, "web", "worker", &format!("{TELL_TOKEN}{TICK}"));
    let _channel = listening(&sandbox, &ticker);
    let paused = pause_within(&sandbox, PauseMode::Freeze, Some(150)).expect("pause");
    assert!(paused.steps_ms["quiesce"] >= 140.0, "{paused:?}");
    assert_eq!(paused.warnings, ["agent 'worker' did not acknowledge the pause within 150 ms"]);
    ticker.stands_still();
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn an_agent_whose_channel_breaks_in_mid_pause_is_not_waited_for() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::running(&sandbox, "web", "worker", &format!("{TELL_TOKEN}{TICK}"));
    let mut channel = listening(&sandbox, &ticker);
    let paused = pause_beside(&sandbox, GRACE_MS, || {
        channel.next_notification().expect("a pause request");
        drop(channel);
    });
    assert!(well_within_the_grace(&paused.expect("pause")));
    ticker.stands_still();
}

#[test]
fn an_acknowledgement_of_an_earlier_pause_does_not_count() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::running(&sandbox, "web", "worker", &format!("{TELL_TOKEN}{TICK}"));
    let mut channel = listening(&sandbox, &ticker);
    channel.call(&AgentAck::default()).expect("acknowledge without a request");
    let paused = pause_within(&sandbox, PauseMode::Freeze, Some(150)).expect("pause");
    assert_eq!(paused.warnings.len(), 1, "{paused:?}");
}

#[test]
fn pausing_twice_is_refused_with_the_checkpoint_that_is_there() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
    let refusal = pause(&sandbox, PauseMode::Park).expect_err("it is paused");
    assert_eq!(refusal.code, Code::AlreadyPaused);
    let details = refusal.details.expect("details");
    assert_eq!(details["checkpoint_id"], paused.checkpoint_id);
    assert_eq!(details["operation_id"], paused.operation_id.as_str());
    assert_eq!(status(&sandbox), ProjectStatus::Paused);
    assert_eq!(checkpoints(&sandbox), [paused.checkpoint_id]);
    ticker.stands_still();
}

#[test]
fn of_two_pauses_at_once_one_wins_and_the_other_learns_which() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::running(&sandbox, "web", "worker", &format!("trap '' TSTP; {TICK}"));
    let answers = std::thread::scope(|scope| {
        let one = || scope.spawn(|| pause_within(&sandbox, PauseMode::Freeze, Some(1_000)));
        [one(), one(), one()].map(|thread| thread.join().expect("an answer"))
    });
    let won: Vec<&PauseResult> = answers.iter().flatten().collect();
    assert_eq!(won.len(), 1, "{answers:?}");
    for lost in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        assert_eq!(lost.code, Code::PauseInProgress, "{lost:?}");
        let details = lost.details.as_ref().expect("details");
        assert_eq!(details["operation_id"], won[0].operation_id.as_str());
    }
    ticker.stands_still();
    assert_eq!(checkpoints(&sandbox), [won[0].checkpoint_id]);
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn of_two_resumes_at_once_one_wins() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    pause(&sandbox, PauseMode::Park).expect("pause");
    let answers = std::thread::scope(|scope| {
        let one = || scope.spawn(|| resume(&sandbox));
        [one(), one(), one()].map(|thread| thread.join().expect("an answer"))
    });
    assert_eq!(answers.iter().flatten().count(), 1, "{answers:?}");
    for lost in answers.iter().filter_map(|answer| answer.as_ref().err()) {
        assert!([Code::ResumeInProgress, Code::NotPaused].contains(&lost.code), "{lost:?}");
    }
    ticker.runs(SOON);
    assert_eq!(the_agent(&sandbox).runs, 2, "it was started once more, not twice");
}

#[test]
fn a_project_without_running_agents_has_nothing_to_pause() {
    let sandbox = Sandbox::start();
    let workspace = furnished(&sandbox, "web");
    sandbox.ctl(&["project", "create", "web", "--workspace", workspace.text()]);
    assert_eq!(pause(&sandbox, PauseMode::Freeze).expect_err("it is idle").code, Code::NothingToPause);
    sandbox.ctl(&["run", "-p", "web", "--wait", "--", "true"]);
    assert_eq!(pause(&sandbox, PauseMode::Freeze).expect_err("it is idle").code, Code::NothingToPause);
    only_these_are_left(&sandbox, &[]);
}

fn a_parked_project_has_no_processes(config: &str) {
    let sandbox = bed(config);
    let ticker = Ticker::running(&sandbox, "web", "worker", TICK_EVERYWHERE);
    let all = [ticker.clone(), ticker.beside("child"), ticker.beside("orphan")];
    all.iter().for_each(|one| one.runs(SOON));
    let group = sandbox.daemon_group().expect("the daemon has a group");
    let daemon = sandbox.daemon_pid();

    let paused = pause(&sandbox, PauseMode::Park).expect("pause");

    assert_eq!(paused.mode, PauseMode::Park);
    assert_eq!(status(&sandbox), ProjectStatus::Paused);
    let hosts: Vec<i32> = process::tree(daemon);
    let left: Vec<i32> = group.into_iter().filter(|pid| !hosts.contains(pid) && process::is_alive(*pid)).collect();
    wait_until(SOON, "the shim to end", || !left.iter().any(|pid| process::is_alive(*pid)));
    let agent = the_agent(&sandbox);
    assert_eq!((agent.status.as_str(), agent.pid), ("paused", None));
    all.iter().for_each(Ticker::stands_still);

    let resumed = resume(&sandbox).expect("resume");
    assert_eq!(resumed.agents[0].method, ResumeMethod::Respawned, "{resumed:?}");
    all.iter().for_each(|one| one.runs(SOON));
}

#[test]
fn parking_ends_all_processes_in_a_group() {
    a_parked_project_has_no_processes(BY_GROUP);
}

#[test]
fn parking_ends_all_processes_by_signals() {
    a_parked_project_has_no_processes(BY_SIGNALS);
}

fn a_cancelled_pause_leaves_no_trace(config: &str, script: &str) {
    let sandbox = bed(config);
    let ticker = Ticker::running(&sandbox, "web", "worker", script);
    fill_context(&sandbox);
    let refusal = pause_beside(&sandbox, GRACE_MS, || {
        let operation = step_is(&sandbox, "quiesce");
        let cancel = OperationCancel { operation_id: operation.id };
        let cancelled = done(&sandbox, &cancel);
        assert_eq!(cancelled.state, OperationState::Cancelled, "{cancelled:?}");
        // A second cancellation finds the operation ended.
        assert_eq!(refused(&sandbox, &cancel).code, Code::OperationNotCancellable);
    });
    assert_eq!(refusal.expect_err("it was cancelled").code, Code::OperationCancelled);
    is_untouched(&sandbox, &ticker, &[]);
    pause_within(&sandbox, PauseMode::Freeze, Some(50)).expect("pause after a cancelled one");
    ticker.stands_still();
}

#[test]
fn a_pause_that_is_cancelled_while_agents_are_quiesced_is_undone_in_a_group() {
    a_cancelled_pause_leaves_no_trace(BY_GROUP, &format!("trap '' TSTP; {TICK}"));
}

#[test]
fn a_pause_that_is_cancelled_while_agents_are_quiesced_is_undone_by_signals() {
    a_cancelled_pause_leaves_no_trace(BY_SIGNALS, &format!("trap '' TSTP; {TICK}"));
}

#[test]
fn agents_that_have_stopped_already_go_on_after_a_cancelled_pause() {
    // The leader never stops, its child in the same group does at once.
    let script = "sh -c 'while :; do printf . >> \"$MARKS.child\"; sleep 0.02; done' & exec perl -e \
        '$SIG{TSTP} = \"IGNORE\"; while (1) { open(my $f, \">>\", $ENV{MARKS}); print $f \".\"; close $f; select(undef, undef, undef, 0.02) }'";
    let sandbox = Sandbox::start();
    let ticker = Ticker::running(&sandbox, "web", "worker", script);
    let child = ticker.beside("child");
    child.runs(SOON);
    let refusal = pause_beside(&sandbox, GRACE_MS, || {
        let operation = step_is(&sandbox, "quiesce");
        child.stands_still();
        done(&sandbox, &OperationCancel { operation_id: operation.id });
    });
    assert_eq!(refusal.expect_err("it was cancelled").code, Code::OperationCancelled);
    child.runs(SOON);
    is_untouched(&sandbox, &ticker, &[]);
}

#[test]
fn a_pause_survives_the_end_of_its_only_agent() {
    let sandbox = Sandbox::start();
    let script = format!("trap '' TSTP; (sleep 0.3; kill -KILL $$) & {TICK}");
    Ticker::running(&sandbox, "web", "worker", &script);
    // In either order the project ends up in a state from which it can be used.
    let answer = pause_within(&sandbox, PauseMode::Freeze, Some(1_000));
    let shown = settled(&sandbox);
    match answer {
        Ok(_) => {
            assert_eq!(shown.project.status, ProjectStatus::Paused);
            resume(&sandbox).expect("resume");
            assert_eq!(status(&sandbox), ProjectStatus::Failed);
        }
        Err(refusal) => assert_eq!(refusal.code, Code::NothingToPause, "{refusal:?}"),
    }
}

#[test]
fn a_pause_of_a_workspace_that_is_gone_is_refused_and_the_agent_runs() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::start(&sandbox);
    let path = sandbox.workspace("web").path().to_owned();
    let aside = path.with_extension("aside");
    fs::rename(&path, &aside).expect("move the workspace");
    let refusal = pause(&sandbox, PauseMode::Freeze).expect_err("there is nothing to save");
    assert_eq!(refusal.code, Code::WorkspaceRefused, "{refusal:?}");
    fs::rename(&aside, &path).expect("move the workspace back");
    is_untouched(&sandbox, &ticker, &[]);
}

#[test]
fn a_pause_by_the_agent_itself_is_answered_after_the_resume() {
    let sandbox = Sandbox::start();
    let ticker = Ticker::running(&sandbox, "web", "worker", &format!("{TELL_TOKEN}{TICK}"));
    let mut client = as_agent(&sandbox, &token(&ticker));
    let paused = client.call(&ProjectPause {
        project: web(),
        reason: Some("a usage limit".into()),
        mode: PauseMode::Freeze,
        grace_ms: None,
    });
    assert!(paused.expect("pause").success);
    ticker.stands_still();
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

/// Sends SIGCONT to every process of the tree, as any process of the same user can.
fn continue_all(pid: i32) {
    for pid in process::tree(pid) {
        // The process may have ended.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGCONT).ok();
    }
}

fn broken(sandbox: &Sandbox) -> usize {
    sandbox.ctl_rows(&["events", "-p", "web"]).iter().filter(|event| event["kind"] == "agent.freeze_broken").count()
}

#[test]
fn a_stray_sigcont_to_a_paused_project_is_undone_and_reported() {
    let sandbox = bed(BY_SIGNALS);
    let ticker = Ticker::running(&sandbox, "web", "worker", TICK_EVERYWHERE);
    pause(&sandbox, PauseMode::Freeze).expect("pause");
    continue_all(the_agent(&sandbox).pid.expect("it runs"));
    let warnings = || show(&sandbox).project.pause.expect("it is paused").warnings;
    wait_until(SOON, "the status to warn", || !warnings().is_empty());
    // They were continued one after the other: the first may be frozen again before the last runs.
    [ticker.clone(), ticker.beside("child"), ticker.beside("orphan")].iter().for_each(Ticker::comes_to_rest);
    assert!(warnings()[0].contains("agent 'worker' ran"), "{:?}", warnings());
    assert!(broken(&sandbox) >= 1);
    let said = sandbox.ctl_output(&["status", "web"]);
    assert!(String::from_utf8_lossy(&said.stderr).contains("agent 'worker' ran"), "{said:?}");
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn a_stray_sigcont_to_a_paused_project_does_nothing_to_a_group() {
    let sandbox = bed(BY_GROUP);
    let ticker = Ticker::running(&sandbox, "web", "worker", TICK_EVERYWHERE);
    let paused = pause(&sandbox, PauseMode::Freeze).expect("pause");
    if paused.mechanism == FreezerKind::Signals {
        return;
    }
    continue_all(the_agent(&sandbox).pid.expect("it runs"));
    [ticker.clone(), ticker.beside("child"), ticker.beside("orphan")].iter().for_each(Ticker::stands_still);
    assert_eq!((broken(&sandbox), show(&sandbox).project.pause.expect("it is paused").warnings), (0, Vec::new()));
    assert!(resume(&sandbox).expect("resume").success);
    ticker.runs(SOON);
}

#[test]
fn a_pause_whose_freeze_another_process_breaks_fails_and_says_so() {
    let sandbox = Sandbox::builder().config(BY_SIGNALS).env("FERMATA_FAILPOINT", "checkpoint.captured=stop").start();
    let ticker = Ticker::running(&sandbox, "web", "worker", TICK_EVERYWHERE);
    let pid = the_agent(&sandbox).pid.expect("it runs");
    let refusal = std::thread::scope(|scope| {
        let pausing = scope.spawn(|| pause(&sandbox, PauseMode::Freeze));
        wait_until(SOON, "the daemon to stand still", || process::state(sandbox.daemon_pid()) == Some('T'));
        continue_all(pid);
        sandbox.signal_daemon(nix::sys::signal::Signal::SIGCONT);
        pausing.join().expect("an answer").expect_err("an agent ran while the workspace was read")
    });
    assert_eq!(refusal.code, Code::PauseFailed);
    assert!(refusal.message.contains("another process has continued the tree"), "{refusal:?}");
    is_untouched(&sandbox, &ticker, &[]);
    pause(&sandbox, PauseMode::Freeze).expect("pause after a failed one");
    ticker.stands_still();
}

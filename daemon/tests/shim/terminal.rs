//! Agents with a terminal: their output and input, the screen of viewers, and the end.

use std::time::Instant;

use crate::bed::{Bed, LONG, PATIENCE, exited, next, until};
use fermata_daemon::shims::link::LinkError;
use fermata_daemon::shims::viewing::{self, Typing, Viewing, ViewingEvent};
use fermata_os::cgroup::FreezerSetting;
use fermata_os::process;
use fermata_protocol::supervision::TerminalSize;
use fermata_shim::wire::{QuiesceOutcome, RefusalCode, ShimEvent, TreeState};
use nix::sys::signal::Signal;
use tokio::sync::mpsc;

for_both_mechanisms!(
    a_frozen_agent_takes_no_input_and_goes_on_where_it_was,
    a_suspended_agent_is_reported_and_stays_suspended_after_a_pause,
    an_agent_with_a_terminal_is_quiesced_by_its_signal,
    stop_and_kill_reach_a_process_that_reads_the_terminal,
);

const SIZE: TerminalSize = TerminalSize { rows: 24, cols: 80 };

fn bed(mechanism: FreezerSetting, script: &str) -> Bed {
    let mut bed = Bed::new(mechanism, script);
    bed.spec.terminal = Some(SIZE);
    bed.spec.env.push(("TERM".into(), "xterm-256color".into()));
    bed
}

fn plain(script: &str) -> Bed {
    bed(FreezerSetting::Auto, script)
}

async fn connect(bed: &Bed) -> (Viewing, Typing) {
    let (mut viewing, typing) = viewing::connect(&bed.spec.socket).await.unwrap();
    assert_eq!(viewing.watch(&typing, None, true).await.unwrap(), SIZE);
    (viewing, typing)
}

/// Connects a viewer and reads at once what it gets: answers arrive on the same connection.
async fn watch(bed: &Bed) -> (mpsc::UnboundedReceiver<ViewingEvent>, Typing) {
    let (mut viewing, typing) = connect(bed).await;
    let (sender, out) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let next = viewing.next().await;
            let over = matches!(next, ViewingEvent::Gone | ViewingEvent::Exited(_));
            if sender.send(next).is_err() || over {
                return;
            }
        }
    });
    (out, typing)
}

/// Reads the viewer's output until it contains a text; returns all of it since the last new screen.
async fn see(viewing: &mut mpsc::UnboundedReceiver<ViewingEvent>, text: &str) -> String {
    let mut output = Vec::new();
    let until = Instant::now() + PATIENCE;
    loop {
        let shown = String::from_utf8_lossy(&output).into_owned();
        if shown.contains(text) {
            return shown;
        }
        let left = until.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, viewing.recv()).await {
            Ok(Some(ViewingEvent::Screen(_))) => output.clear(),
            Ok(Some(ViewingEvent::Output(bytes))) => output.extend_from_slice(&bytes.0),
            other => panic!("waited for {text:?}, got {other:?} after {shown:?}"),
        }
    }
}

async fn type_in(typing: &Typing, text: &str) {
    assert_eq!(typing.type_in(text.into()).await.unwrap(), text.len() as u64);
}

fn refused<T: std::fmt::Debug>(result: Result<T, LinkError>) -> RefusalCode {
    match result {
        Err(LinkError::Refused { code, .. }) => code,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn an_agent_with_a_terminal_has_it_as_its_own_and_in_the_foreground() {
    let bed = plain(
        "test -t 0 && test -t 1 && test -t 2 && echo all three; stty size; tty; \
         ps -o pgid=,tpgid= -p $$ | { read a b; test $a = $b && echo foreground; }; \
         perl -e 'print exists $SIG{TTOU} && $SIG{TTOU} eq q(IGNORE) ? qq(leaked\\n) : qq(default\\n)'; \
         echo gone > /dev/tty; exit 7",
    );
    let _launched = bed.try_launch().await.unwrap();
    assert_eq!(bed.exit_record().await.code, Some(7));
    let logs: Vec<String> =
        bed.logs().iter().map(|line| String::from_utf8_lossy(&line.bytes).trim_end().to_owned()).collect();
    assert_eq!((logs[0].as_str(), logs[1].as_str()), ("all three", "24 80"), "{logs:?}");
    assert!(logs[2].starts_with("/dev/pts/"), "{logs:?}");
    assert_eq!(logs[3..], ["foreground", "default", "gone"]);
}

#[tokio::test]
async fn the_last_output_is_kept_even_when_a_process_keeps_the_terminal_open() {
    // The agent may have ended before the test can connect.
    let bed = plain("setsid sleep 1000 & seq 1 5000; printf 'the end'");
    let _launched = bed.try_launch().await.unwrap();
    let exit = bed.exit_record().await;
    assert_eq!((exit.code, exit.leftovers_killed), (Some(0), 1));
    let text: Vec<u8> = bed.logs().iter().flat_map(|line| [&line.bytes[..], b"\n"].concat()).collect();
    let text = String::from_utf8_lossy(&text);
    assert!(text.contains("4999\r\n5000\r\nthe end"), "{}", &text[text.len().saturating_sub(100)..]);
    assert!(bed.living().is_empty());
}

#[tokio::test]
async fn what_is_typed_arrives_and_ctrl_c_interrupts() {
    let bed = plain(
        "read name; echo \"hello $name\"; trap 'echo interrupted; exit 3' INT; echo ready; while :; do sleep 0.05; done",
    );
    let (_launched, _link, mut events) = bed.launch().await;
    let (mut viewing, typing) = watch(&bed).await;
    type_in(&typing, "Ada\r").await;
    let shown = see(&mut viewing, "ready").await;
    assert!(shown.contains("hello Ada"), "{shown:?}");
    type_in(&typing, "\x03").await;
    see(&mut viewing, "interrupted").await;
    assert_eq!(exited(&mut events).await.code, Some(3));
    loop {
        match viewing.recv().await {
            Some(ViewingEvent::Exited(record)) => break assert_eq!(record.code, Some(3)),
            Some(ViewingEvent::Screen(_) | ViewingEvent::Output(_)) => {}
            Some(ViewingEvent::Gone) | None => panic!("the end was not reported"),
        }
    }
}

#[tokio::test]
async fn a_late_viewer_gets_the_current_screen() {
    let bed = plain(
        "printf 'below\\r\\n'; printf '\\033[?1049h\\033[2J\\033[3;5H\\033[1;31mEDITOR\\033[?2004h\\033[?25l'; \
         echo > drawn; read x; printf '\\033[?1049l'; sleep 1000",
    );
    let (_launched, _link, _events) = bed.launch().await;
    until("the screen to be drawn", || bed.size("drawn") > 0).await;
    for _ in 0..2 {
        // The link of a daemon that is gone leaves nothing behind that the next one would miss.
        let (mut viewing, typing) = watch(&bed).await;
        let shown = see(&mut viewing, "\x1b[?2004h").await;
        let below = shown.find("below").expect("what is behind comes first");
        let other = shown.find("\x1b[?1047h").expect("then the other screen");
        let editor = shown.find("EDITOR").expect("and what it shows");
        assert!(below < other && other < editor, "{shown:?}");
        assert!(shown.contains("\x1b[?25l"), "{shown:?}");
        drop((viewing, typing));
    }
    let (mut viewing, typing) = watch(&bed).await;
    type_in(&typing, "\r").await;
    see(&mut viewing, "\x1b[?1049l").await;
}

#[tokio::test]
async fn a_resize_reaches_the_agent_and_draws_anew() {
    let bed = plain("trap 'stty size' WINCH; stty size; while :; do sleep 0.02; done");
    let (_launched, _link, _events) = bed.launch().await;
    let (mut viewing, typing) = watch(&bed).await;
    see(&mut viewing, "24 80").await;
    typing.resize(TerminalSize { rows: 31, cols: 97 }).await.unwrap();
    see(&mut viewing, "31 97").await;
    let (mut late, typing) = viewing::connect(&bed.spec.socket).await.unwrap();
    assert_eq!(late.watch(&typing, None, false).await.unwrap(), TerminalSize { rows: 31, cols: 97 });
}

#[tokio::test]
async fn viewers_that_never_read_cost_the_agent_nothing() {
    // 50 MB through the terminal; with a viewer that blocked it this would hang.
    let bed = plain(
        "stty -echo; echo ready; read x; yes 0123456789012345678901234567890123456789 | head -c 50M | tail -c 100M; echo > done; read x",
    );
    let (_launched, link, mut events) = bed.launch().await;
    let (mut first, typing) = watch(&bed).await;
    see(&mut first, "ready").await;
    let lazy: Vec<_> = [connect(&bed).await, connect(&bed).await].into();
    type_in(&typing, "\r").await;
    until("the agent to have written everything", || bed.size("done") > 0).await;
    link.status().await.unwrap();
    type_in(&typing, "\r").await;
    drop(lazy);
    assert_eq!(exited(&mut events).await.code, Some(0));
}

#[tokio::test]
async fn questions_to_the_terminal_are_answered_without_any_viewer() {
    let bed = plain(
        "stty raw -echo; printf 'ab\\033[6n'; dd bs=1 count=6 2>/dev/null > cursor; \
         printf '\\033[c'; dd bs=1 count=9 2>/dev/null > identity; stty sane; sleep 1000",
    );
    let (_launched, _link, _events) = bed.launch().await;
    until("both answers", || bed.size("cursor") == 6 && bed.size("identity") == 9).await;
    assert_eq!(std::fs::read(bed.path("cursor")).unwrap(), b"\x1b[1;3R");
    assert_eq!(std::fs::read(bed.path("identity")).unwrap(), b"\x1b[?62;22c");
    let (mut viewing, _typing) = watch(&bed).await;
    let shown = see(&mut viewing, "ab").await;
    assert!(!shown.contains("\x1b[6n") && !shown.contains("\x1b[c"), "a viewer's terminal would answer too: {shown:?}");
}

#[tokio::test]
async fn an_agent_that_does_not_read_takes_only_so_much() {
    let bed = plain("stty raw -echo; echo > ready; exec sleep 1000");
    let (_launched, link, _events) = bed.launch().await;
    until("the terminal to be raw", || bed.size("ready") > 0).await;
    let mut total = 0;
    let piece = vec![b'x'; 16 * 1024];
    for _ in 0..100 {
        total += link.type_in(piece.clone()).await.unwrap();
    }
    assert!(total < 100 * piece.len() as u64 && total >= 64 * 1024, "{total}");
    link.status().await.unwrap();
}

#[tokio::test]
async fn an_agent_without_a_terminal_refuses() {
    let bed = Bed::new(FreezerSetting::Auto, "sleep 1000");
    let (_launched, link, _events) = bed.launch().await;
    assert_eq!(refused(link.type_in(b"x".to_vec()).await), RefusalCode::NoTerminal);
    assert_eq!(refused(viewing::connect(&bed.spec.socket).await.map(drop)), RefusalCode::NoTerminal);
}

async fn a_frozen_agent_takes_no_input_and_goes_on_where_it_was(mechanism: FreezerSetting) {
    let bed = bed(mechanism, "stty -echo; while read line; do echo \"got $line\"; done");
    let (_launched, link, _events) = bed.launch().await;
    let (mut viewing, typing) = watch(&bed).await;
    type_in(&typing, "one\r").await;
    see(&mut viewing, "got one").await;
    link.freeze(LONG).await.unwrap();
    assert_eq!(refused(typing.type_in(b"two\r".to_vec()).await), RefusalCode::AgentFrozen);
    // A new viewer gets the current screen.
    let (mut late, _typing) = watch(&bed).await;
    see(&mut late, "got one").await;
    link.thaw().await.unwrap();
    type_in(&typing, "three\r").await;
    let shown = see(&mut viewing, "got three").await;
    assert!(!shown.contains("two"), "{shown:?}");
}

async fn a_suspended_agent_is_reported_and_stays_suspended_after_a_pause(mechanism: FreezerSetting) {
    // One process: a shell that is stopped while it starts a child does not appear as stopped.
    let bed = bed(mechanism, "echo ready; exec perl -e 'select(undef, undef, undef, 0.02) while 1'");
    let (launched, link, mut events) = bed.launch().await;
    let (mut viewing, typing) = watch(&bed).await;
    see(&mut viewing, "ready").await;
    type_in(&typing, "\x1a").await;
    assert_eq!(next(&mut events).await, Some(ShimEvent::Stopped { signal: libc::SIGTSTP }));
    assert_eq!(link.status().await.unwrap().state, TreeState::Stopped);
    let (again, _) = bed.connect().await;
    assert_eq!(again.suspended(), Some(true), "a new daemon learns it");

    let quiesced = link.quiesce(PATIENCE, LONG).await.unwrap();
    assert_eq!(quiesced.outcome, QuiesceOutcome::AlreadyStopped);
    link.freeze(LONG).await.unwrap();
    link.thaw().await.unwrap();
    assert_eq!(link.status().await.unwrap().state, TreeState::Stopped);

    process::signal(launched.agent, Signal::SIGCONT as i32).unwrap();
    assert_eq!(next(&mut events).await, Some(ShimEvent::Continued {}));
    let (again, _) = bed.connect().await;
    assert_eq!(again.suspended(), Some(false));
}

#[tokio::test]
async fn ctrl_z_stops_the_whole_group_and_a_continue_continues_all_of_it() {
    let writer =
        "perl -e 'while (1) { open(F, q(>>), q(child)); print F q(x); close F; select(undef, undef, undef, 0.01) }'";
    let bed = plain(&format!("{writer} & echo ready; exec perl -e 'select(undef, undef, undef, 0.02) while 1'"));
    let (_launched, link, mut events) = bed.launch().await;
    let (mut viewing, typing) = watch(&bed).await;
    see(&mut viewing, "ready").await;
    bed.growing(&["child"]).await;
    type_in(&typing, "\x1a").await;
    assert_eq!(next(&mut events).await, Some(ShimEvent::Stopped { signal: libc::SIGTSTP }));
    bed.comes_to_rest(&["child"]).await;
    link.signal(libc::SIGCONT).await.unwrap();
    assert_eq!(next(&mut events).await, Some(ShimEvent::Continued {}));
    bed.growing(&["child"]).await;
}

async fn an_agent_with_a_terminal_is_quiesced_by_its_signal(mechanism: FreezerSetting) {
    let bed = bed(mechanism, "echo ready; while :; do sleep 0.02; done");
    let (_launched, link, _events) = bed.launch().await;
    let (mut viewing, typing) = watch(&bed).await;
    see(&mut viewing, "ready").await;
    assert_eq!(link.quiesce(PATIENCE, LONG).await.unwrap().outcome, QuiesceOutcome::Stopped);
    assert_eq!(refused(typing.type_in(b"x".to_vec()).await), RefusalCode::AgentFrozen);
    link.thaw().await.unwrap();
    assert_eq!(link.status().await.unwrap().state, TreeState::Running);
    type_in(&typing, "x").await;
}

async fn stop_and_kill_reach_a_process_that_reads_the_terminal(mechanism: FreezerSetting) {
    for kill in [false, true] {
        // The job has a process group of its own in the foreground; the shell waits for it.
        let bed = bed(mechanism, "set -m; cat; echo the shell went on");
        let (_launched, link, mut events) = bed.launch().await;
        let (mut viewing, typing) = watch(&bed).await;
        type_in(&typing, "echoed\r").await;
        see(&mut viewing, "echoed\r\nechoed").await;
        if kill {
            link.kill().await.unwrap();
        } else {
            link.stop(Some(std::time::Duration::from_millis(100))).await.unwrap();
        }
        let exit = exited(&mut events).await;
        assert!(exit.code.is_some() || exit.signal.is_some());
        until("nothing to be left", || bed.living().is_empty()).await;
    }
}

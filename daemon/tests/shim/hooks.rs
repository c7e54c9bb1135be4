//! The commands before an agent's start and after its end, with real shims and processes.

use std::time::{Duration, Instant};

use crate::bed::{Bed, LONG, PATIENCE, exited, until};
use fermata_daemon::shims::link::{LinkError, ShimLink};
use fermata_daemon::shims::lost::end_lost_tree;
use fermata_os::cgroup::FreezerSetting;
use fermata_os::process;
use fermata_shim::log_line::Stream;
use fermata_shim::record::{read_cut_short, read_exit};
use fermata_shim::spec::HookSpec;
use fermata_shim::wire::{RefusalCode, TreeState};
use tokio_util::task::TaskTracker;

for_both_mechanisms!(
    a_pre_start_runs_in_the_agents_place_and_then_the_agent_does,
    a_failing_pre_start_is_a_failed_start_with_its_reason,
    a_pre_start_that_takes_too_long_is_killed_with_its_whole_tree,
    a_pre_start_is_frozen_stopped_and_killed_like_the_agent,
    frozen_time_does_not_count_against_a_pre_start,
    a_post_stop_runs_when_the_tree_is_gone_and_learns_the_exit,
    nothing_of_a_post_stop_stays_whether_it_ends_is_late_or_killed,
    no_exit_is_lost_when_the_shim_is_killed_in_a_post_stop,
);

fn hook(script: &str) -> Option<HookSpec> {
    let argv = ["sh", "-c", script].into_iter().map(Into::into).collect();
    Some(HookSpec { argv, timeout_ms: 60_000 })
}

fn texts(bed: &Bed, stream: Stream) -> Vec<String> {
    let lines = bed.logs().into_iter().filter(|line| line.stream == stream);
    lines.map(|line| String::from_utf8_lossy(&line.bytes).into_owned()).collect()
}

async fn a_pre_start_runs_in_the_agents_place_and_then_the_agent_does(mechanism: FreezerSetting) {
    let place = "pwd; umask; cat /proc/self/cgroup; cut -d' ' -f6 /proc/self/stat; echo $FERMATA_RUN_ID";
    let mut bed = Bed::new(mechanism, &format!("{place} > agent; echo from the agent; echo $$ > pid; exit 4"));
    bed.spec.umask = 0o027;
    bed.spec.pre_start = hook(&format!("{place} > before; echo $PPID > parent; seq 1 100000; echo late >&2"));
    let launched = bed.try_launch().await.unwrap();
    let exit = bed.exit_record().await;
    assert_eq!((exit.code, &exit.start_failure), (Some(4), &None));
    let read = |name: &str| std::fs::read_to_string(bed.path(name)).unwrap();
    assert_eq!(read("before"), read("agent"));
    let pid = launched.agent.pid.to_string();
    assert_eq!((read("parent").trim(), read("pid").trim()), (&pid[..], &pid[..]));
    // The notes come before and after its output, which is far more than a pipe holds.
    let lines = bed.logs();
    let place = |stream: Stream, text: &str| {
        let found = lines.iter().position(|line| line.stream == stream && line.bytes.starts_with(text.as_bytes()));
        found.unwrap_or_else(|| panic!("no line {text}"))
    };
    let order = [
        place(Stream::Note, "pre-start begins: sh -c"),
        place(Stream::Stdout, "1"),
        place(Stream::Stdout, "100000"),
        place(Stream::Note, "pre-start ended with exit code 0"),
        place(Stream::Stdout, "from the agent"),
    ];
    assert!(order.is_sorted(), "{order:?}");
    assert!(place(Stream::Stderr, "late") < order[3]);
}

async fn a_failing_pre_start_is_a_failed_start_with_its_reason(mechanism: FreezerSetting) {
    let cases = [
        (hook("echo no; exit 7"), "exit 0", "the pre-start command 'sh -c echo no; exit 7' ended with exit code 7"),
        (hook("kill -SEGV $$"), "exit 0", "ended with signal 11"),
        (
            Some(HookSpec { argv: vec!["./no-such-hook".into()], timeout_ms: 60_000 }),
            "exit 0",
            "the pre-start command './no-such-hook' cannot be executed",
        ),
        (hook("exit 0"), "", "there is no program ./no-such-agent"),
    ];
    for (pre_start, script, reason) in cases {
        let mut bed = Bed::new(mechanism, script);
        match script {
            "" => bed.spec.argv = vec!["./no-such-agent".into()],
            _ => bed.spec.argv = ["sh", "-c", "touch ran"].into_iter().map(Into::into).collect(),
        }
        bed.spec.pre_start = pre_start;
        bed.spec.post_stop = hook("touch afterwards");
        bed.try_launch().await.unwrap();
        let exit = bed.exit_record().await;
        let failure = exit.start_failure.unwrap_or_else(|| panic!("{reason}: no failure"));
        assert!(failure.contains(reason), "{failure}");
        assert!(!bed.path("ran").exists());
        assert!(bed.path("afterwards").exists(), "a failed start is an end too");
        assert_eq!(bed.living(), [] as [i32; 0]);
    }
}

async fn a_pre_start_that_takes_too_long_is_killed_with_its_whole_tree(mechanism: FreezerSetting) {
    let mut bed = Bed::new(mechanism, "touch ran");
    bed.spec.pre_start = hook("setsid sleep 600 & (setsid sh -c 'sleep 600; :' &) ; trap '' TERM; sleep 600");
    if let Some(hook) = &mut bed.spec.pre_start {
        hook.timeout_ms = 1_500;
    }
    bed.try_launch().await.unwrap();
    let exit = bed.exit_record().await;
    let failure = exit.start_failure.unwrap();
    assert!(failure.ends_with("did not end within 1500 ms"), "{failure}");
    assert!(!bed.path("ran").exists());
    assert_eq!(bed.living(), [] as [i32; 0]);
}

async fn a_pre_start_is_frozen_stopped_and_killed_like_the_agent(mechanism: FreezerSetting) {
    let script = "while [ ! -e go ]; do echo x >> near; sleep 0.01; done";
    let start = || {
        let mut bed = Bed::new(mechanism, "echo the agent > ran");
        bed.spec.pre_start = hook(script);
        bed
    };
    let bed = start();
    let (_, link, mut events) = bed.launch().await;
    bed.growing(&["near"]).await;
    assert_eq!(link.status().await.unwrap().state, TreeState::Running);
    link.freeze(LONG).await.unwrap();
    bed.still(&["near"]).await;
    link.thaw().await.unwrap();
    bed.growing(&["near"]).await;
    std::fs::write(bed.path("go"), "").unwrap();
    let exit = exited(&mut events).await;
    assert_eq!((exit.code, exit.start_failure), (Some(0), None));
    assert!(bed.path("ran").exists());

    for kill in [false, true] {
        let bed = start();
        let (_, link, mut events) = bed.launch().await;
        bed.growing(&["near"]).await;
        if kill {
            link.kill().await.unwrap()
        } else {
            link.stop(None).await.unwrap()
        }
        let exit = exited(&mut events).await;
        assert_eq!(exit.signal, Some(if kill { libc::SIGKILL } else { libc::SIGTERM }));
        assert_eq!(exit.start_failure, None, "it was ended, it did not fail");
        assert!(!bed.path("ran").exists());
        assert_eq!(bed.living(), [] as [i32; 0]);
    }
}

async fn frozen_time_does_not_count_against_a_pre_start(mechanism: FreezerSetting) {
    // On a machine that is too slow for a limit the test proves nothing: then a longer one is tried.
    for limit in [2, 8, 32, 128].map(Duration::from_secs) {
        let mut bed = Bed::new(mechanism, "exit 5");
        bed.spec.pre_start = hook("touch near; while [ ! -e go ]; do sleep 0.01; done");
        if let Some(hook) = &mut bed.spec.pre_start {
            hook.timeout_ms = limit.as_millis() as u64;
        }
        let launched = Instant::now();
        bed.try_launch().await.unwrap();
        let Ok((link, _events)) = ShimLink::connect(&bed.spec.socket, &TaskTracker::new()).await else { continue };
        if link.freeze(LONG).await.is_err() {
            continue;
        }
        let before = launched.elapsed();
        std::fs::write(bed.path("go"), "").unwrap();
        tokio::time::sleep(limit).await;
        let thawed = Instant::now();
        link.thaw().await.unwrap();
        let exit = bed.exit_record().await;
        if before + thawed.elapsed() < limit {
            return assert_eq!((exit.start_failure, exit.code), (None, Some(5)));
        }
    }
    panic!("the machine is too slow for every limit");
}

async fn a_post_stop_runs_when_the_tree_is_gone_and_learns_the_exit(mechanism: FreezerSetting) {
    let alive = "ls /proc | grep -E '^[0-9]+$' | while read p; do \
        tr '\\0' '\\n' < /proc/$p/cmdline 2>/dev/null | grep -qx 61.7 && echo alive; done";
    let script = format!("{alive}; echo code=$FERMATA_EXIT_CODE signal=$FERMATA_EXIT_SIGNAL; pwd; test ! -e $EXIT");
    for (agent, expected, code) in
        [("setsid sleep 61.7 & exit 42", "code=42 signal=", Some(42)), ("kill -9 $$", "code= signal=9", None)]
    {
        let mut bed = Bed::new(mechanism, agent);
        let exit_file = bed.spec.file("exit.json");
        bed.spec.env.push(("EXIT".into(), exit_file.as_os_str().into()));
        bed.spec.post_stop = hook(&script);
        bed.try_launch().await.unwrap();
        let exit = bed.exit_record().await;
        assert_eq!((exit.code, exit.post_stop_failure), (code, None));
        assert_eq!(texts(&bed, Stream::Stdout), [expected.to_owned(), bed.spec.cwd.display().to_string()]);
        let notes = texts(&bed, Stream::Note);
        assert!(notes[0].starts_with("post-stop begins: sh -c"), "{notes:?}");
        assert_eq!(notes[1], "post-stop ended with exit code 0");
    }
}

async fn nothing_of_a_post_stop_stays_whether_it_ends_is_late_or_killed(mechanism: FreezerSetting) {
    let leave = "setsid sleep 600 & (setsid sh -c 'sleep 600; :' &) ;";
    for (rest, limit_ms, kill, reason) in [
        ("exit 3", 60_000, false, "ended with exit code 3"),
        ("trap '' TERM; sleep 600", 1_000, false, "did not end within 1 s"),
        ("echo up > up; sleep 600", 60_000, true, "was killed"),
    ] {
        let mut bed = Bed::new(mechanism, "exit 42");
        bed.spec.post_stop = hook(&format!("{leave} {rest}"));
        if let Some(hook) = &mut bed.spec.post_stop {
            hook.timeout_ms = limit_ms;
        }
        let (launched, link, mut events) = match bed.try_launch().await {
            // A short-lived agent may end before the link is connected.
            Ok(launched) if kill => {
                let (link, events) = bed.connect().await;
                (launched, Some(link), Some(events))
            }
            Ok(launched) => (launched, None, None),
            Err(error) => panic!("{error}"),
        };
        if let Some(link) = &link {
            until("the post-stop", || bed.path("up").exists()).await;
            match link.freeze(LONG).await {
                Err(LinkError::Refused { code: RefusalCode::Ending, .. }) => {}
                other => panic!("there is no agent to freeze: {other:?}"),
            }
            link.kill().await.unwrap();
        }
        let exit = match &mut events {
            Some(events) => exited(events).await,
            None => bed.exit_record().await,
        };
        assert_eq!(exit.code, Some(42));
        let failure = exit.post_stop_failure.unwrap();
        assert!(failure.contains(reason), "{failure}");
        assert_eq!(bed.living(), [] as [i32; 0]);
        until("the shim's end", || !process::is_alive(launched.shim).unwrap()).await;
    }
}

async fn no_exit_is_lost_when_the_shim_is_killed_in_a_post_stop(mechanism: FreezerSetting) {
    let mut bed = Bed::new(mechanism, "exit 42");
    bed.spec.post_stop = hook("echo up > up; setsid sleep 600 & sleep 600");
    let launched = bed.try_launch().await.unwrap();
    until("the post-stop", || bed.path("up").exists()).await;
    let run = bed.run();
    process::signal(launched.shim, libc::SIGKILL).unwrap();
    until("the end of the shim", || !process::is_alive(launched.shim).unwrap()).await;
    assert!(read_exit(&bed.spec.run_dir).unwrap().is_none());
    assert!(end_lost_tree(&run, &process::boot_id().unwrap(), PATIENCE).unwrap() >= 1);
    assert_eq!(bed.living(), [] as [i32; 0]);
    let exit = read_cut_short(&bed.spec.run_dir).unwrap().unwrap();
    assert_eq!(exit.code, Some(42));
    assert!(exit.post_stop_failure.unwrap().contains("cut short"));
}

# One agent of the chaos test: `perl agent.pl KIND LEDGER`.
#
# Every writing process numbers its lines and keeps a record LEDGER/RUN.WRITER with its pid, the
# number of the line that it is about to write, and the number of the last line that it has written.
# A process that ends by itself first writes its exit code to LEDGER/RUN.exit.
use strict;
use warnings;
use Fcntl qw(O_CREAT O_WRONLY SEEK_SET);
use POSIX ();

my ($kind, $ledger) = @ARGV;
my $run = $ENV{FERMATA_RUN_ID};
my $hash = unpack('%32C*', $run);
my $told_to_end = 0;

sub note {
    my ($book, @numbers) = @_;
    sysseek($book, 0, SEEK_SET);
    syswrite($book, sprintf("%010d %010d %010d\n", $$, @numbers));
}

sub write_lines {
    my ($name, $out, $between, $after_each) = @_;
    sysopen(my $book, "$ledger/$run.$name", O_CREAT | O_WRONLY) or die "open the book of $name: $!";
    for (my $line = 1; ; $line++) {
        note($book, $line, $line - 1);
        # At most PIPE_BUF bytes: the write is atomic.
        until (syswrite($out, "$name $line\n")) { die "write line $line of $name: $!" unless $!{EINTR} }
        note($book, $line, $line);
        $after_each->($line) if $after_each;
        select(undef, undef, undef, $between);
    }
}

sub child_lines { write_lines($_[0], \*STDERR, 0.3) }

sub child(&) {
    my ($work) = @_;
    my $pid = fork;
    die "fork: $!" unless defined $pid;
    return if $pid;
    $SIG{TERM} = 'DEFAULT' unless $kind eq 'deaf';
    $work->();
    POSIX::_exit(0);
}

sub leave {
    my $code = $hash % 3 ? 1 + $hash % 99 : 0;
    open(my $file, '>', "$ledger/$run.exit") or die "open the last page: $!";
    syswrite($file, "$code\n");
    POSIX::_exit($code);
}

# Every second generation ends at once, so that the next one is re-parented.
sub chain {
    my ($generation) = @_;
    POSIX::setsid();
    child_lines('chain') if $generation == 4;
    child { chain($generation + 1) };
    if ($generation % 2) { select(undef, undef, undef, 1) while 1 }
}

# Never more than five short-lived grandchildren at once, half of them orphans.
sub storm {
    POSIX::setsid();
    my $alive = 0;
    while (1) {
        while ($alive < 5) {
            $alive++;
            child { child { select(undef, undef, undef, 0.1) } if rand() < 0.5; select(undef, undef, undef, rand(0.2)) };
        }
        $alive-- if waitpid(-1, 0) > 0;
        select(undef, undef, undef, 0.05);
    }
}

my %trees = (
    plain => sub { },
    session => sub { child { POSIX::setsid(); child_lines('session') } },
    orphan => sub { child { POSIX::setsid(); child { POSIX::setsid(); child_lines('orphan') } } },
    deaf => sub { $SIG{$_} = 'IGNORE' for qw(TERM TSTP HUP INT); child { child_lines('deaf') } },
    storm => sub { child { storm() } },
    group => sub { child { POSIX::setpgid(0, 0); child_lines('group') } },
    stopped => sub { child { POSIX::setpgid(0, 0); kill STOP => $$; child_lines('stopped') } },
    mortal => sub { child { POSIX::setsid(); child_lines('left') } },
    handler => sub { $SIG{TSTP} = sub { kill STOP => $$ } },
    chain => sub { child { chain(1) } },
);
$SIG{TERM} = sub { $told_to_end = 1 };
($trees{$kind} or die "no such kind: $kind")->();
my $last = $kind eq 'mortal' ? 5 + $hash % 60 : 0;
write_lines('main', \*STDOUT, 0.1, sub { leave() if $told_to_end or $_[0] == $last });
